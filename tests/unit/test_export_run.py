"""The export command: the order of its checks, what it compares, and what a failed export leaves behind."""

import dataclasses
import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import InputError, MachineError, TrainshortError
from configs.load import check_run
from configs.paths import certificates_path, config_file
from configs.schema import Model
from tests.support.exports import SHAPE
from tests.support.formula_model import FormulaModel, open_formula_model
from training.evaluation.text import EvaluationText
from training.export.formats.huggingface import HuggingFaceFormat
from training.export.formats.table import CHAIN_FORMAT, FORMATS, LengthLimit, load_format
from training.export.run import export_checkpoint


@pytest.fixture
def model(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> FormulaModel:
    """Let export open a checkpoint of random weights, trained at 32 tokens."""
    return open_formula_model(tmp_path, run_values, monkeypatch)


@pytest.mark.usefixtures("model")
def test_logits_are_compared_at_one_and_four_training_lengths(tmp_path: Path) -> None:
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "export" / "hf")
    assert exported.folder == tmp_path / "export" / "hf"
    assert exported.logits.lengths == (32, 128)
    assert exported.logits.difference <= exported.logits.tolerance
    assert exported.held_out
    assert f"{exported.folder}: at lengths 32 and 128 logits differ by" in str(exported)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["hf"]


@pytest.mark.usefixtures("model")
def test_an_export_is_no_start_of_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "no run"
    run_dir.mkdir()
    for file in (config_file(run_dir), certificates_path(run_dir)):
        file.write_text('{"step": 0}\n')
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "out")
    assert certificates_path(run_dir).read_text() == '{"step": 0}\n', "it has a line for each start"
    assert '"alibi"' in (exported.folder / "certificate.json").read_text()


@pytest.mark.usefixtures("model")
def test_files_have_the_rights_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    before = os.umask(0o027)
    try:
        for name, rights in (("new", 0o750), ("mine", 0o700)):
            out = export_checkpoint(tmp_path, format="hf", out=tmp_path / name).folder
            assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}
            assert stat.S_IMODE(out.stat().st_mode) == rights
    finally:
        os.umask(before)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("exists", [True, False])
def test_ctrl_c_leaves_no_partial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    rename, out = os.rename, tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def interrupted_rename(old: str | Path, new: str | Path) -> None:
        if Path(new).name == "config.json" or (Path(old) / "config.json").exists():
            raise KeyboardInterrupt
        rename(old, new)

    places = {
        "training.export.formats.safetensors_folder.save_file": interrupted,
        "training.export.run.compare_logits": interrupted,
        "os.rename": interrupted_rename,
    }
    for place, replacement in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, replacement)
            with pytest.raises(KeyboardInterrupt):
                export_checkpoint(tmp_path, format="hf", out=out)
        assert sorted(tmp_path.rglob("*")) == before, place


def test_model_that_differs_is_not_exported(model: FormulaModel, tmp_path: Path) -> None:
    model.error = 0.01
    with pytest.raises(TrainshortError, match=r"differ from the trained model's by 0\.01"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "export" / "hf")
    assert not (tmp_path / "export").exists()


@pytest.mark.usefixtures("model")
def test_without_data_random_tokens_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_prepared(checkpoint: object) -> EvaluationText:
        raise InputError("data is not prepared")

    monkeypatch.setattr("training.export.trained.held_out_text", not_prepared)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert not exported.held_out
    assert "on random tokens" in str(exported)


@pytest.mark.usefixtures("model")
def test_length_limit_shortens_the_comparison_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length_limit = HuggingFaceFormat.length_limit

    def limit_of_50(exporter: HuggingFaceFormat, model: Model) -> LengthLimit:
        return dataclasses.replace(length_limit(exporter, model), tokens=50)

    monkeypatch.setattr(HuggingFaceFormat, "length_limit", limit_of_50)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert exported.logits.lengths == (32, 50)
    assert "at lengths 32 and 50 (not 128: transformers' attention scores would take over 2 GB)" in str(exported)


@pytest.mark.parametrize("changed", [{"position": "sinusoidal"}, {"feed_forward": 100}, {"window": 128}])
def test_model_that_the_format_cannot_hold_writes_nothing(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    run_values["model"] = {**SHAPE.model_dump(), **changed}
    run_values["parallel"] = {}
    checkpoint = SimpleNamespace(config=check_run(run_values, name="small"))
    monkeypatch.setattr("training.export.run.open_checkpoint", lambda path: checkpoint)
    (key,) = changed
    with pytest.raises(InputError, match=f"BLOOM cannot hold model.{key}"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "out" / "hf")
    assert not (tmp_path / "out").exists()


def test_every_format_of_the_table_loads() -> None:
    assert CHAIN_FORMAT in FORMATS
    for name, row in FORMATS.items():
        for dtype in row.dtypes:
            load_format(name, dtype=dtype).check(SHAPE.model_copy(update={"hidden": 96}))


def test_formats_outside_the_table_are_refused(tmp_path: Path) -> None:
    for name, dtype, message in (
        ("onnx", None, "format 'onnx' is not known: use hf or gguf"),
        ("hf", "q8_0", "format hf has no weights in 'q8_0': use fp32 or bf16 or fp16"),
        ("gguf", "bf16", "format gguf has no weights in 'bf16': use f32 or f16 or q8_0"),
    ):
        with pytest.raises(InputError, match=message):
            export_checkpoint(tmp_path, format=name, out=tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize(("name", "dtype"), [("hf", "bf16"), ("hf", "fp16"), ("gguf", "f16")])
def test_rounded_weights_are_compared_as_they_are_written(
    model: FormulaModel, tmp_path: Path, name: str, dtype: str
) -> None:
    exported = export_checkpoint(tmp_path, format=name, out=tmp_path / "out", dtype=dtype)
    assert exported.logits.difference <= exported.logits.tolerance
    assert exported.rounding is not None
    assert 10 * exported.logits.difference < exported.rounding.difference < 1
    assert 0 < exported.rounding.divergence < 1e-3
    assert "; rounding the weights changed logits by 0.0" in str(exported)
    card = (exported.folder / "README.md").read_text()
    assert f"the weights here are {dtype}" in card


@pytest.mark.usefixtures("model")
def test_a_folder_with_code_is_compared_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "out", dtype="bf16", with_code=True)
    assert exported.logits.lengths == (32, 128)
    assert exported.logits.difference <= exported.logits.tolerance
    assert (exported.folder / "modeling_trainshort.py").is_file()
    assert "trust_remote_code=True" in (exported.folder / "README.md").read_text()

    right = Path.read_text

    def other_slopes(file: Path, encoding: str | None = None) -> str:
        text = right(file, encoding=encoding)
        return text.replace("(head + 0.5)", "(head + 1.5)") if file.name == "modeling_trainshort.py" else text

    monkeypatch.setattr(Path, "read_text", other_slopes)
    with pytest.raises(TrainshortError, match="differ from the trained model's by"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "wrong", with_code=True)
    assert not (tmp_path / "wrong").exists()


def test_a_weight_out_of_range_is_not_exported(model: FormulaModel, tmp_path: Path) -> None:
    model.weights["final_norm.weight"][0] = 1e5
    with pytest.raises(InputError, match="a weight is larger than fp16 can hold: export in a wider type"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "name"), [("hf", "embedding.word.weight"), ("gguf", "final_norm.weight")])
def test_a_nan_is_not_called_too_large(model: FormulaModel, tmp_path: Path, format: str, name: str) -> None:
    model.weights[name][0] = float("nan")
    with pytest.raises(InputError, match="a weight is nan or infinite: the model has diverged"):
        export_checkpoint(tmp_path, format=format, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


EXPORTED = [
    "README.md",
    "certificate.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
]


@pytest.mark.usefixtures("model")
def test_links_mounts_and_the_working_directory_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def rename_around_mounts(old: str | Path, new: str | Path) -> None:
        if Path(new).is_dir():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))  # as for a mount point
        rename(old, new)

    places = [tmp_path / name for name in ("mount", "cwd", "target")]
    for place in places:
        place.mkdir()
    (places[0] / "lost+found").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.setattr(os, "rename", rename_around_mounts)
    monkeypatch.chdir(tmp_path / "cwd")
    inodes = [place.stat().st_ino for place in places]
    for place, out in zip(places, (tmp_path / "mount", Path(), tmp_path / "link"), strict=True):
        assert export_checkpoint(tmp_path, format="hf", out=out).folder == out
        assert set(EXPORTED) < set(os.listdir(place))
        assert not [name for name in os.listdir(place) if name.startswith(".")]
    assert [place.stat().st_ino for place in places] == inodes
    assert (tmp_path / "link").is_symlink()


@pytest.mark.usefixtures("model")
def test_a_filled_folder_gets_its_configuration_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = os.rename, []

    def record(old: str | Path, new: str | Path) -> None:
        moved.append(Path(new))
        rename(old, new)

    monkeypatch.setattr(os, "rename", record)
    (tmp_path / "out").mkdir()
    export_checkpoint(tmp_path, format="hf", out=tmp_path / "out")
    assert [path.name for path in moved if path.suffix == ".json"][-1] == "config.json"
    assert moved[-1] == tmp_path / "out" / "config.json"


def file_in_the_way(tmp_path: Path, _: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "out"


def link_to_nothing(tmp_path: Path, _: pytest.MonkeyPatch) -> Path:
    (tmp_path / "link").symlink_to("nowhere")
    return tmp_path / "link"


def link_to_itself(tmp_path: Path, _: pytest.MonkeyPatch) -> Path:
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "loop"


def read_only(tmp_path: Path, patch: pytest.MonkeyPatch) -> Path:
    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    patch.setattr(os, "mkdir", mkdir)
    return tmp_path / "new"


def no_rename(tmp_path: Path, patch: pytest.MonkeyPatch) -> Path:
    def rename(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    patch.setattr(os, "rename", rename)
    return tmp_path / "deep" / "new"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (file_in_the_way, "/file/out (Not a directory): choose another --out"),
        (link_to_nothing, "link is a link to nowhere, which does not exist: make that folder or choose another --out"),
        (link_to_itself, "loop is a link to loop, which does not exist: make that folder or choose another --out"),
        (read_only, "/new (Read-only file system): choose another --out"),
        (no_rename, "/deep/new (Invalid cross-device link): choose another --out"),
        (lambda path, _: path / "\udcff", "\udcff has a name that is not UTF-8: choose another --out"),
        (lambda path, _: path / ("n" * 300), "cannot be read (File name too long): choose another --out"),
    ],
)
def test_a_place_is_tried_before_a_checkpoint_is_opened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[Path, pytest.MonkeyPatch], Path],
    message: str,
) -> None:
    out = place(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        export_checkpoint(tmp_path / "no checkpoint", format="hf", out=out)
    assert str(caught.value).startswith(("folder ", f"cannot write beside {tmp_path}"))
    assert str(caught.value).endswith(message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("exists", [True, False])
def test_an_export_that_cannot_take_its_place_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out, compare = tmp_path / "out", HuggingFaceFormat.read_logits

    def meanwhile(exporter: HuggingFaceFormat, folder: Path) -> Any:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("of another")
        return compare(exporter, folder)

    monkeypatch.setattr(HuggingFaceFormat, "read_logits", meanwhile)
    if exists:
        out.mkdir()
    with pytest.raises(MachineError, match="its files are whole in .*: move them") as caught:
        export_checkpoint(tmp_path, format="hf", out=out)
    kept = Path(str(caught.value).split(" whole in ")[-1].removesuffix(": move them"))
    assert set(EXPORTED) < set(os.listdir(kept))
    assert (out / "config.json").read_text() == "of another"


def test_a_disk_that_is_too_small_is_refused_first(
    model: FormulaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * sum(weight.numel() for weight in model.weights.values())
    monkeypatch.setattr("training.export.trained.load_single", lambda _: pytest.fail("the model was loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=weights - 1))
    with pytest.raises(MachineError, match=r"the disk of .* has \d+ k?B free, \d+ kB are needed: free space"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "a" / "out")
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("model")
def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("training.export.formats.safetensors_folder.save_file", full)
    with pytest.raises(MachineError, match=r"cannot be written \(.*No space left on device\): nothing was exported"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name or "partial" in path.name]


def test_taken_folder_is_refused_before_a_checkpoint_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="has files in it"):
        export_checkpoint(tmp_path / "no checkpoint", format="hf", out=out)
    (out / "mine.txt").rename(out / ".hf.partial-12345678")
    with pytest.raises(InputError, match=r"out holds \.hf\.partial-12345678 of a command that runs"):
        export_checkpoint(tmp_path / "no checkpoint", format="hf", out=out)
