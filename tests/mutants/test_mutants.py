"""Each mistake in the table makes its named test fail, in a copy of the code; without it the test passes."""

import compileall
import os
import re
import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

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


def copy_code(folder: Path) -> None:
    """Copy the code into a folder and compile it: this takes longer than most of the tests."""
    for name in PROJECT:
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        assert compileall.compile_dir(folder / name, quiet=1)
    shutil.copy2(HOUSE / "pyproject.toml", folder)


def link_code(right: Path, folder: Path, *, left_out: Path) -> None:
    """Fill a folder with links to the code, but for one file and its bytecode; the folders that it is in are no links.

    Args:
        right: The code, compiled.
        folder: An empty folder.
        left_out: The file, from the root of the code.
    """
    around = (*reversed(left_out.parents), left_out.parent / "__pycache__")
    own = {right / path for path in (left_out, *around)} | {Path(cache_from_source(str(right / left_out)))}
    for each in around:
        (folder / each).mkdir(exist_ok=True)
        for path in (right / each).iterdir():
            if path not in own:
                (folder / each / path.name).symlink_to(path)


def make_wrong(right: Path, folder: Path, mutant: Mutant) -> None:
    """Make a copy of the right code with a wrong change."""
    text = (right / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1, f"{mutant.file} must hold once: {mutant.right}"
    link_code(right, folder, left_out=Path(mutant.file))
    (folder / mutant.file).write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")


def make_copies(folders: dict[str | None, Path]) -> None:
    """Copy the code, make each mutant's copy of it, and note the tests to run.

    Args:
        folders: Empty folders by the mutant's name; that of None is for the right code.
    """
    right = folders[None]
    copy_code(right)
    for mutant in ALL:
        make_wrong(right, folders[mutant.name], mutant)
        (folders[mutant.name] / IDS).write_text(mutant.caught_by, encoding="utf-8")
    (right / IDS).write_text("\n".join(sorted({mutant.caught_by for mutant in ALL})), encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[int, str]]:
    """Pytest's exit code and output for each mutant, by name, and for the right code, by None."""
    folders = {mutant and mutant.name: tmp_path_factory.mktemp("copy") for mutant in (None, *ALL)}
    # Other plugins than pytest's own, such as anyio's, would be imported in each fork.
    more = {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "COLUMNS": "300", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-P", "-m", "tests.mutants.forks", *map(str, folders.values())]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env={**os.environ, **more}, stdin=subprocess.PIPE, **output) as forks:
        make_copies(folders)  # while it imports the libraries
        said, _ = forks.communicate("made", timeout=TIMEOUT_SECONDS)
    assert forks.returncode == 0, said
    return {name: (int((folder / CODE).read_text()), (folder / SAID).read_text()) for name, folder in folders.items()}


def test_right_code_passes_every_named_test(outcomes: dict[str | None, tuple[int, str]]) -> None:
    code, said = outcomes[None]
    assert code == 0, said


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught_by_its_named_test(outcomes: dict[str | None, tuple[int, str]], mutant: Mutant) -> None:
    code, said = outcomes[mutant.name]
    assert code == 1, said
    assert CAUGHT.search(said), said
