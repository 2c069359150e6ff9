"""Each mistake in the table makes its named test fail, in a copy of the code; without it the test passes."""

import compileall
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants.data_mutants import DATA_MUTANTS
from tests.mutants.divergence_mutants import DIVERGENCE_MUTANTS
from tests.mutants.document_mutants import DOCUMENT_MUTANTS
from tests.mutants.evaluation_mutants import EVALUATION_MUTANTS
from tests.mutants.export_mutants import EXPORT_MUTANTS
from tests.mutants.forks import CODE, IDS, PROJECT, SAID
from tests.mutants.fused_mutants import FUSED_MUTANTS
from tests.mutants.measurement_mutants import MEASUREMENT_MUTANTS
from tests.mutants.mutants import MUTANTS, Mutant
from tests.mutants.optimizer_mutants import OPTIMIZER_MUTANTS
from tests.mutants.scale_mutants import SCALE_MUTANTS
from tests.mutants.schedule_mutants import SCHEDULE_MUTANTS
from tests.mutants.study_mutants import STUDY_MUTANTS
from tests.mutants.tracking_mutants import TRACKING_MUTANTS
from tests.mutants.window_mutants import WINDOW_MUTANTS

HOUSE = Path(__file__).parents[2]
ALL = (
    *MUTANTS,
    *WINDOW_MUTANTS,
    *FUSED_MUTANTS,
    *DIVERGENCE_MUTANTS,
    *EXPORT_MUTANTS,
    *STUDY_MUTANTS,
    *SCHEDULE_MUTANTS,
    *EVALUATION_MUTANTS,
    *SCALE_MUTANTS,
    *DATA_MUTANTS,
    *DOCUMENT_MUTANTS,
    *TRACKING_MUTANTS,
    *MEASUREMENT_MUTANTS,
    *OPTIMIZER_MUTANTS,
)
TIMEOUT_SECONDS = 1800
# Output of a test that noticed the mistake; a broken import or fixture does not count.
CAUGHT = re.compile(
    r"^FAILED .* - (AssertionError|assert |Failed: DID NOT RAISE|configs\.errors\.\w+Error|\S+\.WrongPositions)",
    re.MULTILINE,
)


def copy_code(source: Path, folder: Path, *left_out: str, copy: Callable[..., object] = shutil.copy2) -> None:
    """Copy the code of a folder into another, without files of some names."""
    for name in PROJECT:
        ignored = shutil.ignore_patterns(".*", *left_out)
        shutil.copytree(source / name, folder / name, ignore=ignored, copy_function=copy)
    copy(source / "pyproject.toml", folder / "pyproject.toml")


def make_wrong(folder: Path, mutant: Mutant) -> None:
    """Make a wrong change in a copy of the code."""
    file = folder / mutant.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1, f"{mutant.file} must hold once: {mutant.right}"
    file.unlink()  # a link: the file itself is every copy's
    file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    # Python would use the original's bytecode for a mutant of the same age and length.
    for bytecode in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        bytecode.unlink()


def make_copies(folders: dict[str | None, Path]) -> None:
    """Copy the code into each mutant's folder and change it there, and note the tests to run.

    Args:
        folders: Empty folders by the mutant's name; that of None is for the right code.
    """
    right = folders[None]
    copy_code(HOUSE, right, "__pycache__")
    # compiled once, not in each copy: this takes longer than most of the tests
    for name in PROJECT:
        assert compileall.compile_dir(right / name, quiet=1)
    for mutant in ALL:
        copy_code(right, folders[mutant.name], copy=os.link)  # a hundred thousand files
        make_wrong(folders[mutant.name], mutant)
        (folders[mutant.name] / IDS).write_text(mutant.caught_by, encoding="utf-8")
    (right / IDS).write_text("\n".join(sorted({mutant.caught_by for mutant in ALL})), encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[int, str]]:
    """Pytest's exit code and output for each mutant, by name, and for the right code, by None."""
    folders = {mutant and mutant.name: tmp_path_factory.mktemp("copy") for mutant in (None, *ALL)}
    make_copies(folders)
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [sys.executable, "-P", "-m", "tests.mutants.forks", *map(str, folders.values())]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (int((folder / CODE).read_text()), (folder / SAID).read_text()) for name, folder in folders.items()}


def test_right_code_passes_every_named_test(outcomes: dict[str | None, tuple[int, str]]) -> None:
    code, said = outcomes[None]
    assert code == 0, said


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught_by_its_named_test(outcomes: dict[str | None, tuple[int, str]], mutant: Mutant) -> None:
    code, said = outcomes[mutant.name]
    assert code == 1, said
    assert CAUGHT.search(said), said
