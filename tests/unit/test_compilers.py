"""What torch's compilers need is checked before a rank starts: a compiler, and a folder that can be written."""

import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from parallel import compilers
from parallel.compilers import check_cache_folder, check_compiling, missing_compiler


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
