"""Each mistake in the table makes its named test fail, in a copy of the code; without it the test passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.document_mutants import DOCUMENT_MUTANTS
from tests.mutants.evaluation_mutants import EVALUATION_MUTANTS
from tests.mutants.export_mutants import EXPORT_MUTANTS
from tests.mutants.forks import CODE, IDS, PROJECT, SAID
from tests.mutants.mutants import MUTANTS, Mutant
from tests.mutants.scale_mutants import SCALE_MUTANTS
from tests.mutants.study_mutants import STUDY_MUTANTS
from tests.mutants.window_mutants import WINDOW_MUTANTS

HOUSE = Path(__file__).parents[2]
ALL = (
    *MUTANTS,
    *WINDOW_MUTANTS,
    *EXPORT_MUTANTS,
    *STUDY_MUTANTS,
    *EVALUATION_MUTANTS,
    *SCALE_MUTANTS,
    *DOCUMENT_MUTANTS,
)
TIMEOUT_SECONDS = 600
# Output of a test that noticed the mistake; a broken import or fixture does not count.
CAUGHT = re.compile(
    r"^FAILED .* - (AssertionError|assert |Failed: DID NOT RAISE|configs\.errors\.\w+Error|\S+\.WrongPositions)",
    re.MULTILINE,
)


def copy_code(folder: Path, mutant: Mutant | None) -> None:
    """Copy the code into a folder with one wrong change, or none, and note the tests to run there."""
    for name in PROJECT:
        # Leave out bytecode: Python would use the original's for a mutant of the same age and length.
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(HOUSE / "pyproject.toml", folder)
    if mutant is not None:
        file = folder / mutant.file
        text = file.read_text(encoding="utf-8")
        assert text.count(mutant.right) == 1, f"{mutant.file} must hold once: {mutant.right}"
        file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    ids = {each.caught_by for each in ALL} if mutant is None else {mutant.caught_by}
    (folder / IDS).write_text("\n".join(sorted(ids)), encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[int, str]]:
    """Pytest's exit code and output for each mutant, by name, and for the right code, by None."""
    folders: dict[str | None, Path] = {}
    for mutant in (None, *ALL):
        folder = folders[mutant and mutant.name] = tmp_path_factory.mktemp("copy")
        copy_code(folder, mutant)
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
