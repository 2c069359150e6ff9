"""Which checkpoints a run keeps, when it stops, and what a resume must reproduce."""

import errno
import json
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import InputError, MachineError
from configs.files import sync_folder
from configs.load import load_run
from configs.schema import CheckpointRules
from data_pipeline.prepare import prepare_data
from parallel.engine import StepOutcome
from tests.support.compared_runs import make_run
from tests.support.edited_manifest import edit_manifest
from tests.support.one_rank import STEPS, OneRank
from tests.support.steps import step_result
from training import folder, saver
from training.checkpoint import disk, read, write
from training.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from training.checkpoint.rank_part import SaveError
from training.checkpoint.read import open_checkpoint
from training.checkpoint.retention import checkpoints_to_remove
from training.metrics_file import MetricsFile
from training.observers import StepResult
from training.preflight import make_ready, newest_to_resume
from training.state import TrainState

SAVED = 2


@pytest.fixture(scope="module")
def trained(rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    rank.start(run_dir, steps=SAVED)
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def saved(losses: dict[int, float | None]) -> dict[Path, Manifest]:
    layout = {"tensor": 1, "pipeline": 1, "vocab_size": 9}
    return {
        Path(f"{step}"): Manifest(step, step, 0.0, "", loss, **layout, tensors={}, files={})
        for step, loss in losses.items()
    }


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"keep": 2}, [50, 60]),
        ({"keep": 100}, [10, 20, 30, 40, 50, 60]),
        ({"keep": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep": 1, "keep_best": 1}, [30, 60]),
        ({"keep": 1, "keep_best": 2}, [30, 50, 60]),
        ({"keep": 2, "keep_every": 30, "keep_best": 3}, [20, 30, 50, 60]),
    ],
)
def test_the_last_every_nth_and_the_best_are_kept(rules: dict[str, int], kept: list[int]) -> None:
    # of two equal losses, the newer checkpoint is the best
    whole = saved({10: 3.0, 20: 2.5, 30: 2.0, 40: None, 50: 2.5, 60: 2.6})
    removed = checkpoints_to_remove(whole, rules=CheckpointRules(**rules))
    assert [manifest.step for path, manifest in whole.items() if path not in removed] == kept


def test_a_loss_that_is_no_number_is_not_among_the_best() -> None:
    whole = saved({10: math.nan, 20: 3.0, 30: 2.0, 40: math.nan, 50: math.inf, 60: 4.0})
    removed = checkpoints_to_remove(whole, rules=CheckpointRules(keep=1, keep_best=1))
    assert [path.name for path in removed] == ["10", "20", "40", "50"]


def test_a_run_keeps_every_nth_checkpoint(rank: OneRank, tmp_path: Path) -> None:
    rank.start(tmp_path / "run", "checkpoint.keep=1", "checkpoint.keep_every=2", steps=5)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run")] == [2, 4, 5]


def test_kept_steps_must_be_saved_steps() -> None:
    with pytest.raises(InputError) as error:
        load_run("demo", overrides=["checkpoint.every=100", "checkpoint.keep_every=250"])
    assert str(error.value) == (
        "demo: checkpoint.keep_every must be a multiple of checkpoint.every (100), got 250: no other step is saved"
    )


@pytest.mark.parametrize("measured", [0, 30])
def test_the_best_needs_a_validation_at_each_saved_step(measured: int) -> None:
    overrides = ["checkpoint.every=100", "checkpoint.keep_best=2", f"evaluate.every={measured}"]
    with pytest.raises(InputError) as error:
        load_run("demo", overrides=overrides)
    assert str(error.value) == (
        "demo: checkpoint.keep_best is 2, but not every saved step has a validation loss: "
        f"set evaluate.every ({measured}) to checkpoint.every (100) or a divisor of it"
    )


def test_a_stop_file_saves_and_ends_once(
    rank: OneRank, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = MetricsFile.on_step

    def then_stop(self: MetricsFile, step: StepResult) -> None:
        real(self, step)
        (run_dir / "STOP").touch()

    monkeypatch.setattr(MetricsFile, "on_step", then_stop)
    rank.start(run_dir, "checkpoint.every=100")
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [2, 3]
    assert "stopped after step 3, saved: start again to continue" in caplog.text
    assert not (run_dir / "STOP").exists(), "the next start must train"
    monkeypatch.undo()
    rank.start(run_dir)
    assert list_checkpoints(run_dir)[-1].step == STEPS


@pytest.mark.parametrize("saved_step", [0, SAVED])
def test_a_diverged_run_says_what_to_do(
    rank: OneRank, run_dir: Path, monkeypatch: pytest.MonkeyPatch, saved_step: int
) -> None:
    if not saved_step:
        shutil.rmtree(run_dir / "checkpoints")
    outcome = StepOutcome(loss=torch.tensor(math.nan), grad_norm=torch.tensor(math.inf))
    monkeypatch.setattr(type(rank.engine), "train_step", lambda *_, **__: outcome)
    with pytest.raises(InputError) as error:
        rank.start(run_dir)
    advice = "train in another run.dir, with a lower train.learning_rate or more train.warmup_steps"
    if saved_step:
        good = list_checkpoints(run_dir)[-1].path
        advice = (
            f"`trainshort train --set train.rollbacks=1` goes back to {good}, without the samples since; or in another "
            "run.dir, with a lower train.learning_rate, train.branch_from goes on from there"
        )
    else:
        advice += "; no checkpoint was saved"
    assert str(error.value) == (
        f"the loss is nan and the gradient norm inf at step {saved_step + 1}, so training has diverged: {advice}"
    )


def test_an_old_stop_file_ends_a_start_before_its_first_step(rank: OneRank, run_dir: Path) -> None:
    (run_dir / "STOP").touch()
    rank.start(run_dir)
    assert list_checkpoints(run_dir)[-1].step == 2
    assert not (run_dir / "STOP").exists()


def test_a_changed_model_is_refused_unless_it_is_accepted(
    rank: OneRank, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = read.Checkpoint.slice

    def changed(self: read.Checkpoint, *arguments: object, **more: object) -> torch.Tensor:
        return real(self, *arguments, **more) * 1.01  # type: ignore[arg-type]

    monkeypatch.setattr(read.Checkpoint, "slice", changed)
    with pytest.raises(InputError) as error:
        rank.start(run_dir)
    message = str(error.value)
    loss = read_manifest(list_checkpoints(run_dir)[-1].path).probe_loss
    assert f"gave the check batch a loss of {loss:.6f} when it was saved, now " in message
    assert message.endswith("or accept it with `trainshort train --accept-change`")
    rank.start(run_dir, accept_change=True)
    assert list_checkpoints(run_dir)[-1].step == STEPS
    assert f"accepted: checkpoint {run_dir}/checkpoints/step_{SAVED:07d} gave the check batch a loss of" in caplog.text


def test_changed_data_are_refused_by_the_hash_of_their_order(rank: OneRank, run_dir: Path) -> None:
    newest = list_checkpoints(run_dir)[-1].path
    edit_manifest(newest, lambda manifest: manifest.update(order_hash="0" * 64))
    with pytest.raises(InputError, match=r"other samples than those that follow now \(hash 000000000000, now "):
        rank.start(run_dir)


def test_the_order_hash_depends_on_position_seed_and_tokens(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rank.config(tmp_path / "run")
    loader = rank.loader(config)
    hashes = {
        loader.order_hash(0),
        loader.order_hash(4),
        rank.loader(rank.config(tmp_path, "run.seed=2")).order_hash(0),
    }
    assert len(hashes) == 3
    assert rank.loader(config).order_hash(4) in hashes
    other = rank.samples(config)
    read = other.read
    monkeypatch.setattr(other, "read", lambda ids: np.asarray(read(ids)) + 1)
    assert rank.loader(config, samples=other).order_hash(4) not in hashes


def test_init_from_takes_weights_alone_to_other_data_and_length(rank: OneRank, trained: Path, tmp_path: Path) -> None:
    config = rank.config(tmp_path / "run")
    text = tmp_path / "other.txt"
    text.write_text("".join(f"line {i} of other data counts {i * i}\n" for i in range(500)), encoding="utf-8")
    more = [
        f"train.init_from={trained}",
        f"data.sources=[{text}]",
        f"data.dir={tmp_path / 'data'}",
        f"data.tokenizer={open_checkpoint(trained).tokenizer}",
        "data.sequence_length=16",
    ]
    other = rank.config(tmp_path / "run", *more)
    prepared = prepare_data(other.data, folder=tmp_path / "data", progress=False)
    longer = OneRank([*rank.overrides, *more], prepared, rank.engine, rank.groups, rank.initial)
    assert longer.start(tmp_path / "run", "train.learning_rate=1e-12", "train.min_learning_rate=0", steps=1).step == 0
    assert config.data.sequence_length == 8
    began, now = open_checkpoint(trained), open_checkpoint(tmp_path / "run")
    assert (now.step, now.manifest.consumed_samples) == (1, 4)
    for name, weight in began.weights().items():
        torch.testing.assert_close(now.tensor(name, kind="weight"), weight, atol=1e-9, rtol=1e-6)
    moments = now.tensor("embedding.word.weight", kind="exp_avg")
    assert not torch.equal(moments, began.tensor("embedding.word.weight", kind="exp_avg"))
    # altered weights are refused
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for checkpoint in list_checkpoints(copy):
        path = checkpoint.path / "stage_00_tensor_00.weight.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="no checkpoint in .* is whole"):
        longer.start(tmp_path / "again", f"train.init_from={copy}", steps=1)


def test_lines_of_metrics_wait_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, real = MetricsFile(tmp_path, last_step=0), os.write
    file.on_step(step_result(step=1))

    def half(handle: int, data: bytes) -> int:
        real(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", half)
        file.on_step(step_result(step=2))
        file.on_step(step_result(step=3))
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    file.on_step(step_result(step=4))
    file.close("FINISHED")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.ERROR):
        file = MetricsFile(tmp_path, last_step=4)
        patch.setattr(os, "write", half)
        file.on_step(step_result(step=5))
        file.close("FINISHED")
    assert "lacks its last 1 lines" in caplog.text


def test_bytes_that_are_not_utf8_are_no_line_of_metrics(tmp_path: Path) -> None:
    line = json.dumps({"step": 1}).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(line + b'{"step": 1, \xff\x00}\n' + b"\0" * 512)
    MetricsFile(tmp_path, last_step=1).close("FINISHED")
    assert (tmp_path / "metrics.jsonl").read_bytes() == line


def test_a_nan_loss_is_not_saved_and_a_nan_validation_left_out(
    rank: OneRank, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver_of_run = rank.trainer(rank.config(run_dir, "train.decay_steps=4")).saver
    saver_of_run.begin(TrainState(SAVED + 1, 0), validation_loss=math.nan)
    saver_of_run.finish()
    assert read_manifest(list_checkpoints(run_dir)[-1].path).validation_loss is None
    monkeypatch.setattr(saver, "check_loss", lambda *_: math.nan)
    with pytest.raises(SaveError, match=r"^the loss on the check batch is nan after step 4$"):
        saver_of_run.begin(TrainState(SAVED + 2, 0), validation_loss=None)
    assert list_checkpoints(run_dir)[-1].step == SAVED + 1


def test_a_checkpoint_that_cannot_be_read_back_is_not_saved(
    rank: OneRank, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lose_a_file(folder: Path) -> None:
        if folder.name.startswith(".step_"):
            (folder / "tokenizer.model").unlink()
        sync_folder(folder)

    monkeypatch.setattr(write, "sync_folder", lose_a_file)
    with pytest.raises(SaveError, match=r"was not saved, it could not be read again: .*tokenizer.model is missing"):
        rank.start(run_dir)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [1, SAVED]


def test_a_run_that_lost_its_config_is_that_of_its_checkpoint(rank: OneRank, run_dir: Path) -> None:
    (run_dir / "config.yaml").unlink()
    config = rank.config(run_dir, "train.steps=9", "train.learning_rate=1")
    with pytest.raises(InputError, match=r"would change: train.decay_steps was 4, is 9; train.learning_rate was"):
        folder.with_fixed_keys(
            config.model_copy(update={"train": config.train.model_copy(update={"decay_steps": 9})}), run_dir=run_dir
        )
    kept = rank.config(run_dir, "train.steps=9")
    assert folder.with_fixed_keys(kept, run_dir=run_dir).train.decay_steps == STEPS


def test_a_run_whose_last_checkpoint_was_altered_is_not_finished(rank: OneRank, run_dir: Path) -> None:
    config = rank.config(run_dir, f"train.steps={SAVED}", f"train.decay_steps={STEPS}")
    assert make_ready(config, world_size=1, device="cpu").finished
    weights = next((run_dir / "checkpoints" / f"step_{SAVED:07d}").glob("*.weight.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not make_ready(config, world_size=1, device="cpu").finished


def test_a_start_warns_of_a_broken_checkpoint_once(
    rank: OneRank, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = rank.config(run_dir, f"train.steps={STEPS}", f"train.decay_steps={STEPS}")
    broken = run_dir / "checkpoints" / f"step_{SAVED:07d}" / "tokenizer.model"
    broken.write_bytes(broken.read_bytes()[1:])
    for _ in ("the launcher", "the rank"):
        assert make_ready(config, world_size=1, device="cpu").newest is not None
    assert rank.trainer(config).start.step == SAVED - 1
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith(f"checkpoint file {broken} has ")
    assert warning.endswith(f"; it is skipped, and step_{SAVED - 1:07d} is used instead")
    assert "use another" not in warning
    caplog.clear()
    assert newest_to_resume(config, run_dir=run_dir) is not None, "of `check` and `train --dry-run`"
    assert caplog.messages == [warning]


@pytest.mark.parametrize(
    ("place", "given", "found", "run"),
    [
        ("", "run", "run/checkpoints/step_0000002", "run"),
        ("", "run/checkpoints/step_0000001", "run/checkpoints/step_0000001", "run"),
        ("run", ".", "checkpoints/step_0000002", "."),
        ("run/checkpoints", "..", "../checkpoints/step_0000002", ".."),
        ("run/checkpoints", "step_0000001", None, None),
        ("run/checkpoints/step_0000002", ".", None, None),
        ("run/checkpoints/step_0000002", "../step_0000001", None, None),
    ],
)
def test_a_checkpoint_is_named_as_the_user_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, given: str, found: str | None, run: str | None
) -> None:
    run_dir = make_run(tmp_path / "run", checkpoints=(1, 2))
    monkeypatch.chdir(tmp_path / place)
    opened = open_checkpoint(Path(given))
    assert (opened.path.exists(), opened.run_dir.resolve()) == (True, run_dir)
    if found is not None:
        assert (str(opened.path), str(opened.run_dir)) == (found, run)


def test_fewer_steps_than_were_taken_are_refused(rank: OneRank, run_dir: Path) -> None:
    config = rank.config(run_dir, f"train.steps={SAVED - 1}", f"train.decay_steps={STEPS}")
    with pytest.raises(InputError) as caught:
        make_ready(config, world_size=1, device="cpu")
    assert str(caught.value) == (
        f"train.steps is {SAVED - 1}, but {run_dir} is trained to step {SAVED}: set train.steps to {SAVED} or more, "
        "or choose another run.dir"
    )


def test_steps_past_a_schedule_that_ends_at_zero_are_refused(rank: OneRank, run_dir: Path) -> None:
    more = [f"train.steps={STEPS + 1}", f"train.decay_steps={STEPS}"]
    make_ready(rank.config(run_dir, *more), world_size=1, device="cpu")  # the demo's learning rate ends above zero
    with pytest.raises(InputError, match=r"train.steps is 5, but from step 4 on the learning rate is 0 .*; set train"):
        make_ready(rank.config(run_dir / "new", *more, "train.min_learning_rate=0"), world_size=1, device="cpu")


def test_a_stop_file_is_removed_even_if_the_last_save_fails(
    rank: OneRank, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MetricsFile.on_step

    def then_stop(self: MetricsFile, step: StepResult) -> None:
        real(self, step)
        (run_dir / "STOP").touch()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsFile, "on_step", then_stop)
    monkeypatch.setattr(disk, "make_folder", full)
    with pytest.raises(SaveError):
        rank.start(run_dir, "checkpoint.every=100")
    assert not (run_dir / "STOP").exists(), "the next start, with a fixed disk, must train"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"run folder .* cannot be written \(No space left on device\)"):
        with folder.report_write_errors(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
