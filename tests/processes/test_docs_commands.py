"""The commands and the Python code of the pages run, on a small run with the names that the pages use."""

import ast
import contextlib
import io
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
import zstandard

from configs.load import RUNS
from launch import local
from launch.study.processes import Commands
from tests.support.command_line import run_here
from tests.support.data import write_book
from tests.support.huggingface_models import save_random
from tests.support.pages import Block, Command, Page, commands_of, read_pages
from tests.support.small_run import ONE_RANK, TINY, small_run
from tests.support.studies import StudyFiles

PAGES = read_pages("*.md", "docs/*.md")
# Code that belongs into a file of the project: `tests/unit/test_extending.py` runs it there.
FRAGMENTS = ("docs/extending.md",)
# MLflow's own, of its database.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
STEPS = 100  # the pages name its checkpoint
RUN = small_run(
    TINY,
    ONE_RANK,
    {
        "run": {"name": "my", "dir": "runs/my"},
        "model": {"layers": 2},
        "data": {"sources": ["corpus/*.jsonl.zst"], "vocab_size": 600, "split": 0.05},
        "train": {"micro_batch": 1, "global_batch": 4, "steps": STEPS},
        "checkpoint": {"every": STEPS // 2},
        "evaluate": {"every": STEPS, "samples": 2},
    },
)


def write_user_files(folder: Path) -> None:
    """Write the run files and texts that the pages name."""
    write_book(folder, text=topics["specialnames"])
    (folder / "corpus").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in topics.values())
    (folder / "corpus" / "articles.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "my.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    (page,) = read_pages("docs/studies.md")
    (study,) = (block for block in page.blocks if block.language == "yaml")
    (folder / "positions.yaml").write_text(study.text, encoding="utf-8")
    shipped = (RUNS / "alibi-1b3.yaml").read_text(encoding="utf-8")
    (folder / "my-1b3.yaml").write_text(shipped.replace("alibi-1b3", "my-1b3"), encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a trained, evaluated and profiled run, and a copy of it that is called demo."""
    folder = tmp_path_factory.mktemp("home")
    write_user_files(folder)
    with contextlib.chdir(folder):
        for words in ("prepare my.yaml", "train my.yaml", "evaluate runs/my", "profile my.yaml --steps 1"):
            assert run_here(*words.split()) == 0, words
        shutil.copytree("runs/my", "runs/demo")
        tokenizer = folder / f"runs/my/checkpoints/step_{STEPS:07d}/tokenizer.model"
        save_random(folder / "bloom-560m", "bloom", tokenizer=tokenizer, rows=RUN["data"]["vocab_size"])
    return folder


@pytest.fixture
def user_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the user's folder, the working directory; nobody types there, and new runs are trained already."""

    def copy_trained(*_: object, logs: Path, **__: object) -> int:
        if not logs.is_relative_to("runs/my"):  # which is trained, and profiled
            shutil.copytree("runs/my", logs.parent, dirs_exist_ok=True)
        return 0

    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(local, "start_ranks", copy_trained)
    files = StudyFiles()
    monkeypatch.setattr(Commands, "run", lambda self, *arguments: files.run(self, *arguments))
    return tmp_path


def runs_here(command: Command) -> bool:
    """Return whether a command needs nothing but this machine: no srun, torchrun, SLURM, optional package, program."""
    arguments = command.arguments or ()
    submits = {"--submit", "--slurm"} & set(arguments)
    needs_more = arguments[:1] in (("jobs",), ("harness",)) or arguments[:2] == ("track", "copy")
    return command.words[0] == "trainshort" and not needs_more and not submits


def run_command(command: Command) -> None:
    """Run a command in this process; it ends as the page says."""
    assert command.arguments is not None
    name, *values = command.arguments
    if name == "init":  # it makes the file that the user has edited since
        made = Path(f"{values[0]}.yaml")
        edited = made.rename("edited.yaml")
        assert run_here(name, *values) == 0, command
        assert made.is_file()
        edited.replace(made)
        return
    assert (run_here(name, *values) != 0) == command.fails, command


def is_installed(block: Block) -> bool:
    """Return whether all that a block of Python imports is installed."""
    nodes = ast.walk(ast.parse(block.text))
    names = [name for node in nodes for name in _imported(node)]
    return all(find_spec(name.partition(".")[0]) for name in names)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def has_something_to_run(page: Page) -> bool:
    """Return whether a page has commands that run here, or Python code."""
    python = page.name not in FRAGMENTS and any(block.language == "python" for block in page.blocks)
    return python or any(map(runs_here, page.commands()))


RUNNING = [page for page in PAGES if has_something_to_run(page)]


@pytest.mark.parametrize("page", RUNNING, ids=[page.name for page in RUNNING])
@pytest.mark.usefixtures("user_folder")
def test_what_a_page_says_to_type_runs(page: Page) -> None:
    names: dict[str, object] = {}
    for block in page.blocks:
        for command in commands_of(block):
            if command.words[0] == "cp":
                subprocess.run(command.words, check=True)
            elif runs_here(command):
                run_command(command)
        if block.language == "python" and page.name not in FRAGMENTS and is_installed(block):
            exec(compile(block.text, block.place, "exec"), names)
