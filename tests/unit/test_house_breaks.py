"""Each house rule reports code that breaks it, and accepts code that only looks like it."""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.support.house.choices import ChoiceRule, choice_problems, class_problems
from tests.support.house.imports import environment_problems, import_problems, import_routes, is_part_of
from tests.support.house.names import (
    length_problems,
    long_test_names,
    private_uses,
    renamed_imports,
    shared_names,
)
from tests.support.house.source import Source

Rule = Callable[[Source], Iterator[str]]

POSITION = ChoiceRule("model.position", ("alibi", "none"), ("configs/positions.py", "training/model/positions/"))
METHOD = Source("training/model/positions/alibi.py", "class SlopeBias: ...")

BROKEN: list[tuple[Rule, str, list[str]]] = [
    (import_problems, "configs/a.py", ["import parallel.layout", "from training import loop"]),
    (
        import_problems,
        "parallel/a.py",
        ["from data_pipeline.loader import Loader", "from megatron.core import datasets"],
    ),
    (
        import_problems,
        "data_pipeline/a.py",
        ["from parallel import groups", "import sentencepiece"],
    ),
    (
        import_problems,
        "training/a.py",
        [
            "def f():\n    from launch import cli",
            "import deepspeed",
            "from megatron.core import parallel_state",
            "from megatron.core.datasets.gpt_dataset import GPTDataset",
            "import mlflow.tracking",
            "from transformers import BloomConfig",
        ],
    ),
    (
        environment_problems,
        "training/a.py",
        [
            "import os\nos.environ['A']",
            "from os import environ",
            "import os\nos.getenv('A')",
            "import os\nos.environ.setdefault('A', os.environ['B'])",
        ],
    ),
    (length_problems, "training/a.py", ["def f():\n" + "    pass\n" * 50, "pass\n" * 400]),
    (long_test_names, "tests/unit/test_a.py", [f"def test_{'a' * 56}(): ...", f"async def test_{'a' * 56}(): ..."]),
    (
        renamed_imports,
        "training/a.py",
        ["import configs.load as reading", "from configs import load as reading", "from configs.load import load as f"],
    ),
    (
        private_uses,
        "tests/unit/test_a.py",
        [
            "from training.run import _saver",
            "from training import _run",
            "import training._run",
            "run._saver()",
            "loader._samples = ()",
            "self.loader._samples",
            "monkeypatch.setattr(run, '_saver', None)",
            "monkeypatch.setattr('training.run._saver', None)",
            "patch.object(Loader, '_samples')",
            "getattr(run, '_saver')",
            "Loader(_samples=())",
            "class Mine:\n    def _step(self): ...\nrun._saver",
        ],
    ),
    (
        lambda source: choice_problems(source, [POSITION]),
        "training/a.py",
        [
            "position == 'alibi'",
            "'alibi' != model.position",
            "model.position in ('alibi', 'other')",
            "model.position not in {'alibi'}",
            "model.position == 'none'",
            "match position:\n    case 'alibi': ...",
            "{'alibi': 1, 'none': 2}[position]",
        ],
    ),
    (
        lambda source: class_problems(source, [METHOD, source], [POSITION]),
        "training/a.py",
        ["isinstance(bias, SlopeBias)", "issubclass(kind, SlopeBias)", "isinstance(bias, str | SlopeBias)"],
    ),
]

KEPT: list[tuple[Rule, str, list[str]]] = [
    (import_problems, "parallel/a.py", ["import deepspeed", "from configs.schema import Model", "import torch"]),
    (environment_problems, "training/a.py", ["import os\nos.environ.setdefault('A', 'B')"]),
    (environment_problems, "parallel/start.py", ["import os\nos.environ['A']"]),
    (length_problems, "training/a.py", ["def f():\n" + "    pass\n" * 48, "pass\n" * 399]),
    (long_test_names, "tests/unit/test_a.py", [f"def test_{'a' * 55}(): ...", f"def {'a' * 70}(): ..."]),
    (renamed_imports, "training/a.py", ["import numpy as np", "from configs import load"]),
    (
        private_uses,
        "tests/unit/test_a.py",
        [
            "os._exit(0)",
            "self.__dict__",
            "def _helper(): ...\n_helper()",
            "class Mine:\n    def _step(self): ...\nMine()._step()",
            "class Mine:\n    def __init__(self):\n        self._fail = 1\nMine()._fail",
            "monkeypatch.setattr(run, 'saver', None)",
        ],
    ),
    (
        lambda source: choice_problems(source, [POSITION]),
        "training/a.py",
        ["offload == 'none'", "positions['alibi']", "position == other", "{'alibi': 1}"],
    ),
    (lambda source: choice_problems(source, [POSITION]), METHOD.name, ["position == 'alibi'"]),
    (lambda source: class_problems(source, [METHOD], [POSITION]), METHOD.name, ["isinstance(bias, SlopeBias)"]),
    (lambda source: class_problems(source, [METHOD], [POSITION]), "training/a.py", ["isinstance(bias, Tensor)"]),
]


def count(rule: Rule, name: str, text: str) -> int:
    return len(list(rule(Source(name, text))))


def test_a_broken_rule_is_seen_once() -> None:
    counts = {text: count(rule, name, text) for rule, name, texts in BROKEN for text in texts}
    assert [text for text, seen in counts.items() if seen != 1] == []


def test_what_a_rule_allows_is_left_alone() -> None:
    assert [text for rule, name, texts in KEPT for text in texts if count(rule, name, text)] == []


def test_a_relative_import_is_seen() -> None:
    with pytest.raises(AssertionError, match="relative"):
        count(import_problems, "training/a.py", "from . import loop")


def house(**texts: str) -> Iterable[Source]:
    return [Source(f"training/{name}.py", text) for name, text in texts.items()]


def test_a_name_in_two_modules_is_seen() -> None:
    for one, other in (
        ("class Checkpoint: ...", "class Checkpoint: ..."),
        ("def Checkpoint(): ...", "Checkpoint = 1"),
        ("Checkpoint: int = 1", "one, Checkpoint = 1, 2"),
    ):
        assert list(shared_names(house(a=one, b=other))) == ["Checkpoint is in training/a.py and training/b.py"]
    assert list(shared_names(house(a="logger = 1", b="logger = 1"), allowed=("logger",))) == []
    assert list(shared_names(house(a="_cut = 1", b="_cut = 1\ndef f():\n    Cut = 1", c="Cut = 1"))) == []


def test_routes_to_torch_go_through_what_is_imported_at_once() -> None:
    sources = house(
        a="from training import b",
        b="from training.c import f",
        c="try:\n    import torch.nn\nexcept ImportError: ...",
        lazy="def f():\n    import torch",
        typed="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import json",
        light="import torchless",
        in_a_class="class A:\n    from torch import nn",
    )
    assert import_routes(sources, lambda _, imported: is_part_of(imported, "torch")) == {
        "training/c.py": "training/c.py -> torch.nn",
        "training/in_a_class.py": "training/in_a_class.py -> torch.nn",
        "training/b.py": "training/b.py -> training/c.py -> torch.nn",
        "training/a.py": "training/a.py -> training/b.py -> training/c.py -> torch.nn",
    }


def test_a_process_is_refused_in_this_folder() -> None:
    for start in (lambda: subprocess.run(["true"], check=True), lambda: os.system("true")):
        with pytest.raises(pytest.fail.Exception, match="tests/processes"):
            start()
