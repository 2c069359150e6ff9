"""`train.compile` where compiling itself fails: all ranks run uncompiled, or all refuse."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.errors import TritonError

from configs.errors import MachineError
from parallel import compiled
from tests.support.one_rank import one_rank
from training import build


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A compiler that is there and compiles nothing."""

    def compile(_: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*_: Any) -> None:
            raise RuntimeError("no Python.h\nand much more")

        return fails

    monkeypatch.setattr(compiled, "missing_compiler", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", compile)
    return monkeypatch


def test_memory_that_runs_out_is_no_compilers_failure() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(type(error), match=f"^{error}$"), compiled.compiling():
            raise error
    with pytest.raises(compiled.CompilerFailure, match=r"^no ptxas$"), compiled.compiling():
        raise RuntimeError("no ptxas\nsecond line")
    with pytest.raises(compiled.CompilerFailure, match=r"^out of resource: shared memory$"), compiled.compiling():
        raise TritonError("out of resource: shared memory")


def make_auto_compile_here(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build, "make_compile", lambda _, *, device: compiled.make_compile("on", device=device))


def test_on_ends_with_what_failed_and_what_to_do(broken: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = (
        r"^train\.compile on: rank 0 cannot compile: torch's compiler fails \(no Python\.h\): repair it, or set .* off$"
    )
    with pytest.raises(MachineError, match=told), one_rank(tmp_path, "train.compile=on"):
        pytest.fail("an engine was built")


def test_auto_trains_uncompiled_if_any_rank_fails(
    broken: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_auto_compile_here(broken)
    with caplog.at_level(logging.INFO), one_rank(tmp_path) as rank:
        assert rank.start(tmp_path / "run", steps=1).step == 0
    why = "rank 0 cannot compile: torch's compiler fails (no Python.h): repair it"
    assert f"nothing is compiled, so steps are slower: {why}" in caplog.messages
    assert not any("and much more" in line or line.startswith("compiled") for line in caplog.messages)
    # Another rank fails, and compiling would have worked here: this rank would fail if it then called what it compiled.
    broken.setattr(build, "compile_now", lambda *_, **__: None)
    broken.setattr(build, "all_gather_object", lambda fault, *, group: [fault, "install triton"])
    with caplog.at_level(logging.INFO), one_rank(tmp_path) as rank:
        assert rank.start(tmp_path / "other", steps=1).step == 0
    assert "nothing is compiled, so steps are slower: rank 1 cannot compile: install triton" in caplog.messages
