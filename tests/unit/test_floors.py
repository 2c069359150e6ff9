"""The house's rules: who may import whom, who owns which library, how long things may get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
FLOORS = {"configs": 0, "parallel": 1, "data_pipeline": 1, "training": 2, "launch": 3}
# One owner per library; the longest name that matches decides.
OWNERS = {
    "deepspeed": "parallel/",
    "megatron": "parallel/",
    "megatron.core.datasets": "data_pipeline/",
    "sentencepiece": "data_pipeline/tokenizer.py",
    "sentencepiece.sentencepiece_model_pb2": "data_pipeline/vocabulary.py",  # the file format
    "mlflow": "training/tracking/",
    "transformers": "training/export/",
    "tokenizers": "training/export/",
    "gguf": "training/export/",
    "typer": "launch/",
    "jinja2": "launch/",
    "yaml": "configs/",
}
ENVIRONMENT_READERS = ("parallel/start.py", "launch/")
FILE_LINES, FUNCTION_LINES = 400, 50

FILES = sorted(file for package in FLOORS for file in (HOUSE / package).rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(HOUSE).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from megatron.core import datasets` imports megatron.core.datasets
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def import_problems(name: str, tree: ast.AST) -> Iterator[str]:
    package = name.split("/")[0]
    for line, imported in imports(tree):
        top = imported.split(".")[0]
        if top in FLOORS and top != package and FLOORS[top] >= FLOORS[package]:
            yield f"{name}:{line} imports {imported}, from floor {FLOORS[top]} into floor {FLOORS[package]}"
        owned = [library for library in OWNERS if f"{imported}.".startswith(f"{library}.")]
        if owned and not name.startswith(owner := OWNERS[max(owned, key=len)]):
            yield f"{name}:{line} imports {imported}, which is for {owner} alone"


def environment_problems(name: str, tree: ast.AST) -> Iterator[str]:
    if name.startswith(ENVIRONMENT_READERS):
        return
    nodes = list(ast.walk(tree))
    # A library's own settings may be given a default there: that is no reading.
    given = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "setdefault"]
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb") and node not in given:
            yield f"{name}:{node.lineno} reads the environment: let parallel/start.py do it"
    for line, imported in imports(tree):
        if imported in ("os.environ", "os.getenv"):
            yield f"{name}:{line} reads the environment: let parallel/start.py do it"


def length_problems(name: str, text: str, tree: ast.AST) -> Iterator[str]:
    if (lines := len(text.splitlines())) >= FILE_LINES:
        yield f"{name} has {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines >= FUNCTION_LINES:
                yield f"{name}:{node.lineno} {node.name} has {lines} lines"


def problems_of(name: str, text: str) -> list[str]:
    tree = ast.parse(text)
    return [
        *import_problems(name, tree),
        *environment_problems(name, tree),
        *length_problems(name, text, tree),
    ]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_keeps_the_rules(file: Path) -> None:
    assert problems_of(name_of(file), file.read_text(encoding="utf-8")) == []


def test_every_folder_of_code_is_a_package() -> None:
    folders = {file.parent for file in FILES} | {file.parent for file in (HOUSE / "tests").rglob("*.py")}
    assert [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("configs/a.py", "import parallel.layout"),
        ("configs/a.py", "from training import loop"),
        ("parallel/a.py", "from data_pipeline.loader import Loader"),
        ("data_pipeline/a.py", "from parallel import groups"),
        ("training/a.py", "def f():\n    from launch import cli"),
        ("training/a.py", "import deepspeed"),
        ("training/a.py", "from megatron.core import parallel_state"),
        ("parallel/a.py", "from megatron.core import datasets"),
        ("parallel/a.py", "from megatron.core.datasets.gpt_dataset import GPTDataset"),
        ("data_pipeline/a.py", "import sentencepiece"),
        ("training/loop.py", "import mlflow.tracking"),
        ("training/model/a.py", "from transformers import BloomConfig"),
        ("training/a.py", "import os\nos.environ['A']"),
        ("training/a.py", "from os import environ"),
        ("training/a.py", "import os\nos.getenv('A')"),
        ("training/a.py", "import os\nos.environ.setdefault('A', os.environ['B'])"),
        ("training/a.py", "def f():\n" + "    pass\n" * 50),
        ("training/a.py", "pass\n" * 400),
    ],
)
def test_a_broken_rule_is_seen(name: str, text: str) -> None:
    assert len(problems_of(name, text)) == 1


def test_a_relative_import_is_seen() -> None:
    with pytest.raises(AssertionError, match="relative"):
        problems_of("training/a.py", "from . import loop")
