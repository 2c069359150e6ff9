"""Exports beside training: one process at a time, here a fake, which training neither waits for nor fails with."""

import errno
import json
import logging
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load_run
from configs.schema import RunConfig
from configs.terminal import Terminal
from parallel.start import environment_beside_ranks, find_process_rank
from tests.support.one_rank import STEPS, OneRank
from tests.support.steps import step_result
from training.checkpoint.manifest import list_checkpoints, step_folder
from training.export.while_training import ExportsWhileTraining, check_export_every
from training.incarnation import Fence, begin_incarnation
from training.metrics_file import MetricsFile
from training.observers import Observer, Save
from training.trainer import Trainer


class FakeExport:
    """A process that runs until its code is set."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.pid, self.command, self.log = 0, command, log
        self.code: int | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        out = Path(command[command.index("--out") + 1])
        self.step = int(out.name.removeprefix("step-"))
        self.partial = out.with_name(f".{out.name}.partial-0123abcd")
        self.partial.mkdir(parents=True)

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -signal.SIGKILL

    def wait(self) -> int:
        assert self.code is not None, "training waits for an export"
        return self.code

    def succeed(self) -> None:
        self.code = 0
        self.partial.rename(self.partial.with_name(f"step-{self.step:08d}"))

    def fail(self, code: int, output: str) -> None:
        self.code = code
        self.log.write_text(output)


class Exports:
    """Exports of a run with fake processes."""

    def __init__(self, config: RunConfig, *, fence: Fence | None = None) -> None:
        self.run_dir = Path(config.run.dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.started: list[FakeExport] = []
        fence = fence or begin_incarnation(self.run_dir)
        self.observer = ExportsWhileTraining(config, fence=fence, start=self._start)

    def _start(self, command: Sequence[str], log: Path) -> FakeExport:
        self.started.append(FakeExport(command, log))
        return self.started[-1]

    @property
    def steps(self) -> list[int]:
        return [each.step for each in self.started]

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "exports").iterdir())

    def save(self, *steps: int) -> None:
        for step in steps:
            folder = step_folder(self.run_dir / "checkpoints", step=step)
            folder.mkdir(parents=True, exist_ok=True)
            self.observer.on_save(Save(step, folder, 0.1))

    def look(self) -> None:
        self.observer.on_step(step_result())


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    every = ["checkpoint.every=1", "checkpoint.export_every=2", "train.steps=99", "train.warmup_steps=1"]
    return load_run("demo", overrides=[f"run.dir={tmp_path / 'run'}", *every])


@pytest.fixture
def exports(config: RunConfig, caplog: pytest.LogCaptureFixture) -> Exports:
    caplog.set_level(logging.INFO)
    return Exports(config)


def test_a_format_that_has_the_models_family_is_named(config: RunConfig) -> None:
    jais = config.model_copy(update={"model": config.model.model_copy(update={"family": "jais"})})
    advice = r"set checkpoint\.export_format to gguf, checkpoint\.export_every \(2\) to 0, or change the model"
    with pytest.raises(InputError, match=rf"has no class for model\.family jais \(it has bloom, mpt\): {advice}"):
        check_export_every(jais)


def test_the_newest_step_waits_for_the_one_that_runs(exports: Exports, caplog: pytest.LogCaptureFixture) -> None:
    exports.save(1, 2, 3, 4, 6, 8, 9)
    run = exports.run_dir
    assert exports.steps == [2]
    assert [path.name for path in exports.observer.checkpoints_in_use()] == ["step_0000002", "step_0000008"]
    assert exports.started[0].command[1:] == [
        *("-P", "-m", "trainshort", "export", "--format", "hf", "--out", f"{run}/exports/step-00000002"),
        *("--", f"{run}/checkpoints/step_0000002"),
    ]
    exports.started[0].succeed()
    exports.look()
    assert exports.steps == [2, 8]
    assert [path.name for path in exports.observer.checkpoints_in_use()] == ["step_0000008"]
    exports.started[1].succeed()
    exports.look()
    assert exports.observer.checkpoints_in_use() == []
    assert [re.sub(r" in [\d.]+ s$", "", message) for message in caplog.messages] == [
        "step 4 is not exported: step 2 still is, and step 6 is next",
        "step 6 is not exported: step 2 still is, and step 8 is next",
        f"exported step 2 to {run}/exports/step-00000002",
        f"exported step 8 to {run}/exports/step-00000008",
    ]


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (3, "warning: slow\nerror: the disk is full: free space\n", "the disk is full: free space"),
        (3, "error: ran out of memory\n  held: 2 GB\n  limit: 3 GB\n", "ran out of memory"),
        (1, "Traceback\n  ...\nKeyError: 'x'\n\n", "KeyError: 'x'"),
        (2, "", "exit code 2"),
        (-signal.SIGKILL, "exporting", "ended by SIGKILL, out of memory?"),
        (-signal.SIGTERM, "", "ended by SIGTERM"),
    ],
)
def test_a_failed_export_is_a_warning_with_its_log(
    exports: Exports, caplog: pytest.LogCaptureFixture, code: int, output: str, reason: str
) -> None:
    exports.save(2, 4)
    exports.started[0].fail(code, output)
    exports.look()
    log = exports.run_dir / "logs" / "export-00000002.log"
    assert caplog.messages == [f"step 2 was not exported ({reason}): see {log}"]
    assert caplog.records[0].levelno == logging.WARNING
    assert exports.steps == [2, 4], "the next one does not start"
    assert exports.folders == [".step-00000004.partial-0123abcd"]


def test_a_stop_ends_the_export_and_the_next_start_makes_it(
    config: RunConfig, exports: Exports, caplog: pytest.LogCaptureFixture
) -> None:
    exports.save(2, 4, 5)
    exports.observer.close("KILLED")
    assert exports.started[0].code == -signal.SIGKILL
    assert exports.folders == []
    assert caplog.messages == ["the export of step 4 is left to the next start"]
    (exports.run_dir / "exports" / ".step-00000002.partial-89abcdef").mkdir()
    again = Exports(config)
    again.observer.resume(5)
    assert again.steps == [4]
    assert again.folders == [".step-00000004.partial-0123abcd"]
    again.started[0].succeed()
    earlier = Exports(config)
    earlier.observer.resume(5)
    assert earlier.steps == [], "it is exported already"
    earlier.observer.resume(3)  # the checkpoints after it are broken
    assert earlier.steps == [2]


def test_an_older_start_leaves_the_exports_of_a_newer_one(config: RunConfig, exports: Exports) -> None:
    exports.save(2)
    Exports(config)
    exports.observer.close("SUPERSEDED")
    assert exports.started[0].code == -signal.SIGKILL
    assert exports.folders == [".step-00000002.partial-0123abcd"]


def test_a_step_that_was_exported_is_not_overwritten(exports: Exports, caplog: pytest.LogCaptureFixture) -> None:
    folder = exports.run_dir / "exports" / "step-00000002"
    folder.mkdir(parents=True)
    exports.save(2)
    assert exports.steps == []
    assert caplog.messages == [f"step 2 is not exported again: {folder} exists"]


def test_exports_of_steps_that_are_taken_again_are_made_again(
    exports: Exports, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        exports.save(step)
        exports.started[-1].succeed()
    exports.save(6, 8)
    exports.observer.on_rollback(6)  # the export of its checkpoint goes on
    assert [path.name for path in exports.observer.checkpoints_in_use()] == ["step_0000006"]
    exports.observer.on_rollback(2)
    assert exports.observer.checkpoints_in_use() == []
    assert [re.sub("until-.*", "until-", name) for name in exports.folders] == ["step-00000002", "step-00000004.until-"]
    assert "step-00000004 is of a step that is taken again: renamed to step-00000004.until-" in caplog.text
    exports.save(4)
    assert exports.steps == [2, 4, 6, 4]


def test_a_start_renames_the_exports_of_later_steps(config: RunConfig, exports: Exports) -> None:
    for step in (2, 4):
        exports.save(step)
        exports.started[-1].succeed()
    again = Exports(config)
    again.observer.resume(3)  # killed before the observers learned of a rollback
    assert [re.sub("until-.*", "until-", name) for name in again.folders] == ["step-00000002", "step-00000004.until-"]
    again.save(4)
    assert again.steps == [4]


def test_a_finished_run_waits_for_its_last_export(exports: Exports, caplog: pytest.LogCaptureFixture) -> None:
    exports.save(98, 99)
    exports.observer.close("FINISHED")
    asked = [0]

    def nobody_asks() -> bool:
        asked[0] += 1
        exports.started[-1].succeed()
        return False

    exports.observer.finish(asked=nobody_asks, terminal=Terminal())
    assert exports.folders == ["step-00000098", "step-00000099"]
    assert asked == [2]
    assert caplog.messages[0] == "training has ended: waiting for the export of step 99"
    assert len(caplog.messages) == 3


def test_a_stop_after_training_says_what_to_type(exports: Exports, caplog: pytest.LogCaptureFixture) -> None:
    exports.save(99)
    exports.observer.finish(asked=lambda: True, terminal=Terminal())
    run = exports.run_dir
    assert exports.folders == []
    assert caplog.messages[1] == (
        f"stopped: step 99 is not exported; `trainshort export --format hf {run}/checkpoints/step_0000099 "
        f"--out {run}/exports/step-00000099` does it"
    )


def test_an_export_changes_nothing_of_training(rank: OneRank, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(name: str, make: Callable[[RunConfig, Fence], list[Observer]], *, kept: list[int]) -> Trainer:
        rules = ["checkpoint.keep=1", "checkpoint.export_every=2", f"train.steps={STEPS}", f"train.decay_steps={STEPS}"]
        config = rank.config(tmp_path / name, *rules)
        trainer = rank.trainer(config)
        trainer.run([MetricsFile(tmp_path / name, last_step=0), *make(config, trainer.fence)])
        assert saved_steps(tmp_path / name) == kept
        return trainer

    def no_process(command: Sequence[str], log: Path) -> FakeExport:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    train("alone", lambda config, fence: [], kept=[4])
    train("failing", lambda config, fence: [ExportsWhileTraining(config, fence=fence, start=no_process)], kept=[4])
    running: list[Exports] = []

    def make(config: RunConfig, fence: Fence) -> list[Observer]:
        running.append(Exports(config, fence=fence))
        return [running[0].observer]

    trainer = train("running", make, kept=[2, 4])  # retention leaves the checkpoint that is exported
    running[0].started[0].succeed()
    trainer.saver.remove_old()
    assert saved_steps(tmp_path / "running") == [4]
    assert losses_of(tmp_path / "alone") == losses_of(tmp_path / "failing") == losses_of(tmp_path / "running")
    assert "step 2 was not exported: no process can be started (Cannot allocate memory)" in caplog.messages


def saved_steps(run_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run_dir)]


def losses_of(run_dir: Path) -> list[float]:
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    return losses


def test_a_process_beside_the_ranks_is_none_of_them() -> None:
    local = {"TRAINSHORT_RANK": "0", "TRAINSHORT_RANKS": "2", "TRAINSHORT_RENDEZVOUS": "/meet", "PATH": "/bin"}
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "8"}
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    for of_rank in (local, torchrun, slurm | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}):
        assert find_process_rank(of_rank) is not None
        beside = environment_beside_ranks(of_rank)
        assert find_process_rank(beside) is None
        assert (beside["OMP_NUM_THREADS"], beside["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert environment_beside_ranks(local)["PATH"] == "/bin"
