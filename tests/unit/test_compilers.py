"""What torch's compilers need is checked before a rank starts; and the order in which the ranks compile."""

import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import InputError
from configs.load import load_run
from parallel import compilers
from parallel.axes import Group, Groups
from parallel.compilers import check_cache_folder, check_compiling, missing_compiler
from parallel.layout import Layout
from training import build


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", {"cc": "/bin/cc", "mine": "/bin/mine"}.get)
    assert missing_compiler("cpu", environ={}) == "install a C++ compiler (g++)"
    assert missing_compiler("cpu", environ={"CXX": "mine"}) is None
    monkeypatch.setattr(compilers, "find_spec", lambda _: None)
    assert missing_compiler("cuda", environ={}) == "install triton"
    monkeypatch.setattr(compilers, "find_spec", lambda name: name)
    assert missing_compiler("cuda", environ={}) is None
    assert missing_compiler("cuda", environ={"CC": "other"}) == "install a C compiler (gcc)"


def test_only_on_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for word in ("auto", "off"):
        check_compiling(word, device="cpu", environ={})
    told = r"train\.compile is on, but this machine cannot compile: install a C\+\+ compiler \(g\+\+\), or set .* off$"
    with pytest.raises(InputError, match=told):
        check_compiling("on", device="cpu", environ={})
    with pytest.raises(InputError, match=r"^train\.compile is triton, which needs a GPU, .*: set it to auto$"):
        check_compiling("triton", device="cpu", environ={})
    monkeypatch.setattr(compilers, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^train\.compile is triton, but .* compile: install triton, or set .* off$"):
        check_compiling("triton", device="cuda", environ={})


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        told = f"^TORCHINDUCTOR_CACHE_DIR is '.*/{folder}', where .* name a folder that can be written, or unset it$"
        with pytest.raises(InputError, match=told):
            check_cache_folder({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder)})
    check_cache_folder({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "new")})
    check_cache_folder({})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("rank", "device", "order"),
    [
        (0, "cpu", ["compile", "meet", "meet"]),
        (3, "cpu", ["meet", "compile", "meet"]),
        (0, "cuda:0", ["compile", "meet", "meet"]),
        (3, "cuda:3", ["compile", "meet", "meet"]),  # it would find nothing of what was compiled for the first GPU
    ],
)
def test_gpus_compile_at_once_and_cpus_after_one(
    monkeypatch: pytest.MonkeyPatch, rank: int, device: str, order: list[str]
) -> None:
    class Built(Exception):  # noqa: N818
        pass

    def build_layers(*_: object, **__: object) -> None:
        raise Built

    def meet(fault: object, *, group: Group) -> list[object]:
        seen.append("meet")
        return [fault] * group.size

    seen: list[str] = []
    monkeypatch.setattr(build, "compiling_fault", lambda *_, **__: seen.append("compile"))
    monkeypatch.setattr(build, "all_gather_object", meet)
    monkeypatch.setattr(build, "plan_layers", build_layers)
    here, alone = Group(rank, 4, None), Group(0, 1, None)
    config = load_run("demo", overrides=["train.compile=on", "parallel.tensor=1", "parallel.pipeline=1"])
    with pytest.raises(Built):
        build.build_engine(
            config,
            layout=Layout(1, 1, 4, zero=1, micro_batches=1),
            groups=Groups(here, alone, alone, here, None),
            vocab_size=600,
            device=torch.device(device),
        )
    assert seen == order
