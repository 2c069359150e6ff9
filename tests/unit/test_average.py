"""The mean of checkpoints: compared with numpy's and torch's, used as any model, and refused where it means nothing."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from configs.errors import InputError
from configs.load import dump_run, load_run
from configs.paths import checkpoints_folder, config_file
from tests.support.command_line import Call, contents, refused
from tests.support.exports import random_weights
from training.averaging.average import average_checkpoints
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import read_manifest, step_folder
from training.checkpoint.read import open_checkpoint
from training.checkpoint.tensors import TensorFile
from training.checkpoint.weights_only import write_weights_only
from training.evaluation.precheck import check_request
from training.evaluation.request import EvaluationRequest
from training.evaluation.text import held_out_text
from training.families.table import shards_of
from training.reproduction.reproduce import compare_with_here
from training.state import TrainState

STEPS = (2, 4, 6, 8)


def save_weights(run_dir: Path, step: int, *overrides: str, vocab_size: int = 600, tokenizer: Path) -> Path:
    """Write a checkpoint of random weights of the small run, without optimizer state."""
    # as the first start of a run fixes it
    config = load_run("run.yaml", overrides=[f"run.dir={run_dir}", "train.decay_steps=10", *overrides])
    weights = random_weights(config.model, vocab_size=vocab_size, seed=step)
    folder = step_folder(checkpoints_folder(run_dir), step=step)
    folder.mkdir(parents=True)
    write_weights_only(
        folder,
        weights.values(),
        shards=[*shards_of(config.model, vocab_size=vocab_size).values()],
        state=TrainState(step, 8 * step, left_out_samples=3),
        config=config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )
    return folder


@dataclass(frozen=True)
class Home:
    """A user's folder, the working directory, with a run that has its data in its folder and some checkpoints."""

    folder: Path
    run: Path
    checkpoints: tuple[Path, ...]


@pytest.fixture(scope="module")
def made_once(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(prepared_once, folder, dirs_exist_ok=True)
    (folder / "run").mkdir()
    (folder / "data").rename(folder / "run/data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_run("run.yaml", overrides=["data.dir=null", "train.decay_steps=10"])
        config_file(folder / "run").write_text(dump_run(config))
        for step in STEPS:
            save_weights(Path("run"), step, "data.dir=null", tokenizer=Path("run/data/tokenizer.model"))
    return folder


@pytest.fixture
def home(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    folders = tuple(step_folder(Path("run/checkpoints"), step=step) for step in STEPS)
    return Home(tmp_path, Path("run"), folders)


def weight_file(run_dir: Path, step: int) -> Path:
    return step_folder(checkpoints_folder(run_dir), step=step) / "stage_00_tensor_00.weight.safetensors"


def test_the_mean_is_that_of_numpy_and_of_torch(home: Home) -> None:
    chosen = home.checkpoints[1:]
    result = average_checkpoints([home.run], out=Path("mean"), last=3)
    averaged = load_file(weight_file(Path("mean"), 8))
    read = [load_file(weight_file(home.run, step)) for step in STEPS[1:]]
    for name, value in averaged.items():
        expected = np.mean([each[name] for each in read], axis=0, dtype=np.float64).astype(np.float32)
        assert np.array_equal(value, expected), name
    models = [nn.ParameterList(map(torch.from_numpy, each.values())) for each in read]
    swa = AveragedModel(models[0])
    for model in models:
        swa.update_parameters(model)
    for value, expected in zip(averaged.values(), swa.module, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), expected.data, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"^mean is the mean of 3 checkpoints, of steps .*: make it again with"):
        compare_with_here(Path("mean"), here=Mock(), reads_all=False)
    saved = read_manifest(result.checkpoint)
    assert (saved.step, saved.consumed_samples, saved.left_out_samples) == (8, 64, 3)
    document = json.loads(Path("mean/averaged.json").read_text())
    assert [each["path"] for each in document["checkpoints"]] == [str(path.absolute()) for path in chosen]
    for each in document["checkpoints"]:
        assert each["manifest_sha256"] == describe_file(Path(each["path"]) / "manifest.json").sha256
        assert (each["run"], each["step"]) == ("small", int(each["path"][-7:]))
    # the order in which they are given changes nothing
    average_checkpoints([chosen[2], chosen[0], chosen[1]], out=Path("again"))
    assert weight_file(Path("again"), 8).read_bytes() == weight_file(Path("mean"), 8).read_bytes()


def test_an_average_is_used_as_any_model(trainshort: Call, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = trainshort("checkpoint", "average", "run", "--out", "deep/my mean")
    assert answer.code == 0, answer
    assert answer.out.splitlines()[0].endswith("parameters; the mean of 4 checkpoints, of steps 2, 4, 6, 8")
    assert answer.out.splitlines()[-1] == "averaged: deep/my mean"
    config = load_run("deep/my mean/config.yaml")
    assert (config.run.name, config.run.dir) == ("my-mean", "deep/my mean")
    message = (
        "deep/my mean holds weights without optimizer state, from which no training resumes: train in another run.dir "
        "with train.init_from: deep/my mean"
    )
    assert refused(trainshort, "train", "deep/my mean/config.yaml", "--set", "train.steps=8") == message
    more = ("--set", "run.dir=new", "--set", "data.dir=run/data", "--set", "train.init_from=deep/my mean")
    answer = trainshort("train", "run.yaml", "--dry-run", *more)
    assert (answer.code, "begins at step 0, with the weights of deep/my mean" in answer.out) == (0, True)
    assert trainshort("checkpoint", "verify", "deep/my mean").code == 0
    # it holds no moments
    weights = weight_file(Path("deep/my mean"), 8).stat().st_size
    reshaped = trainshort("checkpoint", "reshape", "deep/my mean", "--dry-run", "--json").out
    assert json.loads(reshaped)["state_bytes"] == weights
    said = trainshort("checkpoint", "reshape", "deep/my mean").out
    assert "start one in any layout with train.init_from: deep/my mean/checkpoints/step_0000008, or" in said
    assert "8/10" in trainshort("runs", "deep").out
    text = held_out_text(open_checkpoint(home.run))
    # from another folder, and on the text of the run
    monkeypatch.chdir(home.folder / "deep")
    check_request(Path("my mean"), EvaluationRequest(lengths=(256,)))
    assert np.array_equal(held_out_text(open_checkpoint(Path("my mean"))).tokens, text.tokens)
    exported = trainshort("export", "my mean", "--format", "hf", "--out", "hf")  # compares logits with transformers'
    assert (exported.code, "on held-out text" in exported.out) == (0, True), exported
    assert "| weights | the mean of 4 checkpoints, of steps 2, 4, 6, 8 |" in Path("hf/README.md").read_text()
    Path("my mean/averaged.json").write_text("[]")
    message = refused(trainshort, "export", "my mean", "--format", "hf", "--out", "other")
    assert message.startswith("my mean/averaged.json cannot be read (list indices must be")


def test_a_link_to_a_checkpoint_finds_the_text(trainshort: Call, home: Home) -> None:
    Path("links").mkdir()
    Path("links/newest").symlink_to(home.checkpoints[-1].absolute(), target_is_directory=True)
    answer = trainshort("checkpoint", "average", "links/newest", str(home.checkpoints[0]), "--out", "mean", "--json")
    document = json.loads(answer.out)
    assert [each["step"] for each in document["averaged"]] == [2, 8]
    assert document["checkpoint"] == "mean/checkpoints/step_0000008"
    assert load_run("mean/config.yaml").data.dir == str(home.folder / "run/data")
    message = refused(trainshort, "checkpoint", "average", "links/newest", str(home.checkpoints[-1]), "--out", "other")
    assert message == f"links/newest and {home.checkpoints[-1]} are the same checkpoint: give each once"


def test_shared_data_is_found_from_another_folder(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    (home.folder / "run/data").rename(home.folder / "shared")
    Path("run/config.yaml").write_text(dump_run(load_run("run/config.yaml", overrides=["data.dir=shared"])))
    text = held_out_text(open_checkpoint(home.run))
    (home.folder / "deep").mkdir()
    monkeypatch.chdir(home.folder / "deep")
    assert np.array_equal(held_out_text(open_checkpoint(Path("../run"))).tokens, text.tokens)
    average_checkpoints([Path("../run")], out=Path("mean"), last=2)
    assert load_run("mean/config.yaml").data.dir == str(home.folder / "shared")
    Path("shared").mkdir()  # as everywhere, a relative path begins here first
    with pytest.raises(InputError, match=r"data is not prepared in shared \(relative to .*deep\)"):
        held_out_text(open_checkpoint(Path("../run")))


def alter(home: Home) -> None:
    file = weight_file(home.run, 2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def other_model(home: Home) -> None:
    save_weights(Path("other"), 3, "model.heads=8", tokenizer=Path("run/data/tokenizer.model"))


def other_rows(home: Home) -> None:
    more = ("data.vocab_size=640",)
    save_weights(Path("other"), 3, *more, vocab_size=640, tokenizer=Path("run/data/tokenizer.model"))


def other_tokenizer(home: Home) -> None:
    file = Path("tokenizer.model")
    file.write_bytes(Path("run/data/tokenizer.model").read_bytes() + b"\x00")
    save_weights(Path("other"), 3, tokenizer=file)


A, B, OTHER = (f"{run}/checkpoints/step_000000{step}" for run, step in (("run", 2), ("run", 8), ("other", 3)))
REFUSED: dict[str, tuple[str, Callable[[Home], None] | None, str]] = {
    "one alone": (A, None, f"{A} would be the only checkpoint of the average: give two or more"),
    "one of a run": ("run --last 1", None, f"{B} would be the only checkpoint"),
    "more than there are": ("run --last 5", None, "run has 4 checkpoints, fewer than --last 5: lower --last, or keep"),
    "last of one": (f"{A} --last 2", None, f"--last 2 is for a run folder, and {A} is a checkpoint: give the run"),
    "last of several": (f"{A} {B} --last 2", None, "--last 2 is for one run folder, and 2 paths are given: leave"),
    "two runs": (f"run {A}", None, "run is a run folder, and 2 paths are given: give one, or checkpoints"),
    "the same twice": (f"{A} {B} {B}/../step_0000002", None, f"{A} and {B}/../step_0000002 are the same checkpoint"),
    "no checkpoint": ("run/checkpoints", None, "run/checkpoints is not a checkpoint, it has no manifest.json: give"),
    "altered bytes": ("run", alter, f"checkpoint file {weight_file(Path('run'), 2)} was altered: its SHA-256 begins"),
    "another model": (f"{A} {OTHER}", other_model, f"{A} has model.heads 4, {OTHER} has 8: an average needs"),
    "another vocabulary": (f"{B} {OTHER}", other_rows, f"{OTHER} has a vocabulary of 640, {B} has 600: an average"),
    "another tokenizer": (f"{B} {OTHER}", other_tokenizer, f"{OTHER} has a tokenizer of SHA-256 "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_mean_is_refused(trainshort: Call, home: Home, name: str) -> None:
    arguments, prepare, message = REFUSED[name]
    if prepare is not None:
        prepare(home)
    seen = refused(trainshort, "checkpoint", "average", *arguments.split(), "--out", "mean")
    assert seen.startswith(message), seen


def test_nothing_is_written_into_a_run(trainshort: Call, home: Home) -> None:
    assert refused(trainshort, "checkpoint", "average", "run", "--out", "run") == (
        "folder run has files in it: remove them or choose another --out"
    )
    for out in ("run/checkpoints/mean", f"{home.checkpoints[0]}/mean"):
        message = refused(trainshort, "checkpoint", "average", "run", "--out", out)
        assert message.startswith(f"--out {out} is in {home.folder}/run/checkpoints, where checkpoints are removed")


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 3), (KeyboardInterrupt(), 130)]
)
def test_a_broken_average_leaves_nothing(
    trainshort: Call, home: Home, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    added: list[str] = []

    def fail_at_third(self: TensorFile, name: str, value: Tensor) -> None:
        added.append(name)
        if len(added) == 3:
            raise error

    monkeypatch.setattr(TensorFile, "add", fail_at_third)
    before = contents(home.folder)
    answer = trainshort("checkpoint", "average", "run", "--out", "deep/mean")
    assert answer.code == code, answer
    if code == 3:
        assert "nothing was averaged; free space or choose another --out" in answer.error
    assert contents(home.folder) == before
