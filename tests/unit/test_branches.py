"""Runs that branch off: they go on exactly as the run whose checkpoint they continue, and refuse what would not."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError
from configs.schema import RunConfig
from configs.step_sizes import StepSize
from launch.show.run import run_summary, show_summary
from launch.start_check import dry_run_lines
from tests.support.diverging import lines_of
from tests.support.edited_manifest import edit_manifest
from tests.support.one_rank import STEPS, OneRank, one_rank
from training.check_notes import check_notes
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.folder import with_fixed_keys
from training.metrics_reader import steps_before_first
from training.preflight import make_ready
from training.state import TrainState

AT = 2
KEPT = "checkpoint.keep=9"
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def trunk(rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of each step."""
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    rank.start(run_dir, KEPT)
    return run_dir


@pytest.fixture
def point(trunk: Path) -> Path:
    """The checkpoint to branch off from."""
    return trunk / "checkpoints" / f"step_{AT:07d}"


def column(run_dir: Path, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in keys) for line in lines_of(run_dir)]


def assert_same_state(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.step, one.manifest.consumed_samples) == (other.step, other.manifest.consumed_samples)
    for name in one.manifest.tensors:
        for kind in KINDS:
            assert torch.equal(one.tensor(name, kind=kind), other.tensor(name, kind=kind)), (name, kind)


def test_a_branch_with_the_same_keys_equals_its_trunk(
    rank: OneRank, trunk: Path, point: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    branch = tmp_path / "branch"
    with caplog.at_level("INFO"):
        assert rank.start(branch, f"train.branch_from={point}", KEPT) == TrainState(AT, AT * 4)
    assert f"branching off after step {AT}, {point}" in caplog.text
    exact = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "consumed_samples")
    assert column(branch, *exact) == column(trunk, *exact)[AT:]
    assert steps_before_first(branch) == AT
    assert [saved.step for saved in list_checkpoints(branch)] == [AT + 1, STEPS]
    assert_same_state(open_checkpoint(branch), open_checkpoint(trunk))
    files = [read_manifest(list_checkpoints(folder)[-1].path).files for folder in (branch, trunk)]
    hashes = [{name: each.sha256 for name, each in of.items() if name.endswith("safetensors")} for of in files]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == len(KINDS)


def test_a_branch_has_a_schedule_and_a_batch_of_its_own(rank: OneRank, point: Path, tmp_path: Path) -> None:
    keys = ["train.schedule=wsd", "train.decay_steps=6", "train.cooldown_steps=3", "train.min_learning_rate=0"]
    branch, more = tmp_path / "branch", [*keys, "train.global_batch=6", "train.micro_batch=3", KEPT]
    rank.start(branch, f"train.branch_from={point}", *more, steps=5)
    train = rank.config(branch, *keys, "train.steps=5").train
    rates = [train.learning_rate, *(train.learning_rate * left / 3 for left in (2, 1))]
    assert [rate for (rate,) in column(branch, "learning_rate")] == pytest.approx(rates)
    assert column(branch, "step", "consumed_samples") == [(3, 14), (4, 20), (5, 26)]
    # its samples are those that the trunk did not take
    config = rank.config(branch, *more)
    taken = rank.loader(config).step(AT * 4, StepSize(6, 8))
    everything = rank.loader(rank.config(branch)).step
    assert torch.equal(
        torch.cat(taken), torch.cat([*everything(8, StepSize(4, 8)), *everything(12, StepSize(4, 8))])[:6]
    )


def test_a_branch_needs_its_trunk_until_it_has_saved(rank: OneRank, trunk: Path, tmp_path: Path) -> None:
    copy, branch = tmp_path / "trunk", tmp_path / "branch"
    shutil.copytree(trunk, copy)
    keys = [f"train.branch_from={copy / 'checkpoints' / f'step_{AT:07d}'}", KEPT]
    (branch / "STOP").parent.mkdir()
    (branch / "STOP").touch()
    assert rank.start(branch, *keys).step == AT, "stopped before its first step"
    assert list_checkpoints(branch) == []
    assert rank.start(branch, *keys, steps=3).step == AT, "so it branches off again"
    shutil.rmtree(copy)
    assert rank.start(branch, *keys).step == 3
    assert [step for (step,) in column(branch, "step")] == [3, 4]
    assert_same_state(open_checkpoint(branch), open_checkpoint(trunk))


def test_a_branch_may_have_another_precision(rank: OneRank, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with one_rank(home, "train.precision=bf16") as half:
        half.start(tmp_path / "half", KEPT, steps=2)
    start = rank.start(tmp_path / "branch", f"train.branch_from={tmp_path / 'half'}")
    assert start.step == 2
    assert [step for (step,) in column(tmp_path / "branch", "step")] == [3, 4]


def ready(rank: OneRank, run_dir: Path, *more: str) -> RunConfig:
    return make_ready(rank.config(run_dir, *more), world_size=1, device="cpu").config


def test_skipping_a_broken_checkpoint_of_a_trunk_is_a_warning(
    rank: OneRank, trunk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, config = tmp_path / "trunk", rank.config(tmp_path / "run", f"train.branch_from={tmp_path / 'trunk'}")
    shutil.copytree(trunk, copy)
    newest, before = [each.path for each in reversed(list_checkpoints(copy))][:2]
    (newest / "manifest.json").write_text("{")
    for warn in (False, True):
        started = make_ready(config, world_size=1, device="cpu", warn=warn)
        assert started.config.train.branch_from == str(before)
        assert len(caplog.messages) == warn
    assert caplog.messages[0].startswith(f"checkpoint {newest} has a broken manifest.json (")
    assert caplog.messages[0].endswith(f"; it is skipped, and {before.name} is used instead")


def test_relative_checkpoints_begin_where_the_run_was_started(rank: OneRank, trunk: Path, tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    shutil.copytree(trunk, home / "trunk")
    (tmp_path / "scratch").mkdir()
    (home / "runs").symlink_to(tmp_path / "scratch")  # a run was started where its link is
    point = Path("trunk", "checkpoints", f"step_{AT:07d}")
    for key, given in (("branch_from", "trunk"), ("branch_from", point), ("init_from", point)):
        run_dir = Path("runs", f"{key}-{Path(given).name}")
        with contextlib.chdir(home):
            rank.start(run_dir, f"train.{key}={point}", KEPT)
        with contextlib.chdir(away):
            for again in (given, home / given):  # as it was typed, and as it is named from here
                config = rank.config(home / run_dir, f"train.{key}={again}", "train.decay_steps=4", "train.steps=4")
                fixed = getattr(with_fixed_keys(config, run_dir=home / run_dir).train, key)
                assert Path(home, fixed) == home / point, (key, again)
            config = rank.config(home / run_dir, f"train.{key}={away}", "train.decay_steps=4", "train.steps=4")
            with pytest.raises(InputError, match=f"train.{key} was '{point}', is '{away}': set the old values"):
                with_fixed_keys(config, run_dir=home / run_dir)


def refused(rank: OneRank, run_dir: Path, *more: str) -> str:
    with pytest.raises(InputError) as caught:
        ready(rank, run_dir, *more)
    message = str(caught.value)
    # `check` says the same
    assert message in check_notes(rank.config(run_dir, *more), device="cpu", environ={})
    return message


def test_what_a_branch_cannot_continue_is_refused(rank: OneRank, point: Path, tmp_path: Path) -> None:
    def message(*more: str, at: Path = point) -> str:
        return refused(rank, tmp_path / "branch", f"train.branch_from={at}", *more)

    instead = "or take its weights alone with train.init_from"
    of_point = f"train.branch_from {point}"
    assert message("train.steps=2") == (
        f"{of_point} is of step 2, and train.steps is 2: a branch goes on counting, so set train.steps to more than 2"
    )
    assert message("model.heads=4") == (
        f"{of_point} has model.heads 2, the run has 4: initial weights need the same model"
    )
    for key, then, now in (("run.seed", "1", "2"), ("data.sequence_length", "8", "16")):
        assert message(f"{key}={now}") == (
            f"{of_point} was trained with {key} {then}, the run has {now}: a branch continues with the same optimizer "
            f"and the samples that follow; set {key} to that, {instead}"
        )
    unprepared = (f"train.branch_from={point}", "data.vocab_size=600", f"data.dir={tmp_path / 'none'}")
    notes = check_notes(rank.config(tmp_path / "branch", *unprepared), device="cpu", environ={})
    assert any(note.startswith(f"{of_point} was trained with data.vocab_size 400, the run has 600: ") for note in notes)
    no = tmp_path / "no"
    assert message(at=no).startswith(f"train.branch_from {no}: checkpoint {no} does not exist: give a folder of ")
    copy = tmp_path / "copy" / point.name
    shutil.copytree(point, copy)
    edit_manifest(copy, lambda manifest: manifest.update(vocab_size=399))
    assert f"{copy} has another tokenizer than the data in " in message(at=copy)
    weights = {name for name in read_manifest(point).files if ".exp_avg" not in name}
    edit_manifest(
        copy, lambda manifest: manifest.update(files={name: manifest["files"][name] for name in sorted(weights)})
    )
    assert message(at=copy) == (
        f"train.branch_from {copy} has no optimizer state, as imported models and averages: use another checkpoint, "
        f"{instead}"
    )


def test_other_samples_are_refused_by_their_hash(rank: OneRank, point: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / point.name
    shutil.copytree(point, copy)
    edit_manifest(copy, lambda manifest: manifest.update(order_hash="0" * 64))
    with pytest.raises(InputError) as caught:
        rank.start(tmp_path / "branch", f"train.branch_from={copy}")
    message = str(caught.value)
    assert message.startswith(f"checkpoint {copy} was saved before other samples than those that follow now (hash 0000")
    assert message.endswith(
        "): bring back the data that it was trained on, or take its weights alone with train.init_from"
    )


def test_a_start_says_where_it_branches_off(
    rank: OneRank, point: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (f"train.branch_from={point}", f"train.steps={STEPS}", "train.global_batch=6")
    config = rank.config(tmp_path / "branch", *keys)
    line = f"branches off after step {AT}, {point}"
    assert check_notes(config, device="cpu", environ={}) == [f"training {line}"]
    lines = dry_run_lines(config, None, ranks=1, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert line in lines
    # those of the trunk are smaller: 2 of 32 tokens
    assert any(text.endswith(" parameters; 4 steps, 160 tokens in all") for text in lines)
    assert f"to go: {STEPS - AT} steps, 96 tokens, 48 a step" in lines
    # with as many steps as the trunk, which a note refuses, nothing is said of it
    for run, shown in (
        (config, "steps 3 to 4 of 48 tokens (160"),
        (rank.config(tmp_path, *keys, "train.steps=2"), "2 steps of 48 tokens (96"),
    ):
        show_summary(run_summary(run, device="cpu", notes=[]))
        assert f"  training  {shown} in all) at length 8\n" in capsys.readouterr().out


def test_a_check_knows_what_it_can_of_a_lost_trunk(
    rank: OneRank, point: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, branch = tmp_path / "trunk" / "checkpoints" / point.name, tmp_path / "branch"
    keys = (f"train.steps={STEPS}", "train.global_batch=6", KEPT)

    def shown(*more: str) -> str:
        show_summary(run_summary(rank.config(branch, *keys, *more), device="cpu", notes=[]))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  training"))
        return line.removeprefix("  training").strip()

    unknown = "of 48 tokens (those of its trunk are not known) at length 8"
    assert shown(f"train.branch_from={gone}") == f"steps 3 to 4 {unknown}"
    assert shown(f"train.branch_from={tmp_path}") == f"steps up to 4 {unknown}"
    shutil.copytree(point, gone)
    rank.start(branch, *keys[1:], f"train.branch_from={gone}")
    shutil.rmtree(gone)
    assert shown(f"train.branch_from={gone}") == "steps 3 to 4 of 48 tokens (160 in all) at length 8"


def test_a_start_counts_the_steps_past_its_schedule(rank: OneRank, tmp_path: Path) -> None:
    def to_go(*keys: str) -> str:
        config = rank.config(tmp_path / "run", "train.steps=9", *keys)
        lines = dry_run_lines(config, None, ranks=1, environ={"CUDA_VISIBLE_DEVICES": ""})
        return next(line for line in lines if line.startswith("to go: "))

    assert (
        to_go("train.decay_steps=5") == "to go: 9 steps, 288 tokens, 32 a step; the last 4 at train.min_learning_rate"
    )
    for keys in (("train.decay_steps=9",), ("train.schedule=constant", "train.min_learning_rate=0")):
        assert to_go(*keys) == "to go: 9 steps, 288 tokens, 32 a step"
    assert to_go("train.schedule=constant", "train.min_learning_rate=0", "train.decay_steps=5").endswith(
        "288 tokens, 32 a step"
    )


def test_the_checkpoint_of_a_branch_is_fixed_at_its_first_start(rank: OneRank, trunk: Path, tmp_path: Path) -> None:
    other, branch = tmp_path / "trunk", tmp_path / "branch"
    shutil.copytree(trunk, other)
    shutil.rmtree(list_checkpoints(other)[-1].path)
    keys = (f"train.branch_from={other}", "train.steps=9")
    newest = str(list_checkpoints(other)[-1].path)
    config = ready(rank, branch, *keys)
    assert (config.train.branch_from, config.train.decay_steps) == (newest, 9)
    rank.trainer(config)  # which writes config.yaml
    shutil.copytree(trunk / "checkpoints" / f"step_{STEPS:07d}", other / "checkpoints" / f"step_{STEPS:07d}")
    newer = str(list_checkpoints(other)[-1].path)
    assert ready(rank, branch, *keys).train.branch_from == newer, "no step was taken: the first may be broken or gone"
    (branch / "metrics.jsonl").write_text('{"step": 4}\n')
    assert ready(rank, branch, *keys).train.branch_from == newest
    assert ready(rank, branch, f"train.branch_from={newest}", "train.steps=9").train.branch_from == newest
    assert run_summary(rank.config(branch, *keys), device="cpu", notes=[])["first_step"] == STEPS, "not the newer one's"
    for changed in (f"train.branch_from={trunk}", "train.branch_from=null"):
        with pytest.raises(InputError, match=r"would change: train.branch_from was "):
            with_fixed_keys(rank.config(branch, changed, "train.steps=9"), run_dir=branch)
