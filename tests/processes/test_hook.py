"""The command of `track.hook` is told of each event, one at a time, and never fails training."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load_run
from configs.paths import checkpoints_folder, hook_log, logs_folder, rank_log
from configs.schema import RunConfig
from configs.terminal import Terminal
from tests.support.processes import is_alive, wait_until
from tests.support.steps import step_result
from training import hook
from training.checkpoint.manifest import step_folder
from training.followed_log import FollowedLog
from training.hook import ENDS_TOLD, HookObserver, tell_end
from training.incarnation import begin_incarnation
from training.observers import Save

TELL = 'echo "$TRAINSHORT_EVENT|$TRAINSHORT_STEP|$(basename "$TRAINSHORT_CHECKPOINT")|$TRAINSHORT_MESSAGE" >>events'
# until the test says go
WAIT = f"{TELL}; until test -e go; do sleep 0.02; done"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENDS_TOLD, raising=False)


def config_of(command: str) -> RunConfig:
    config = load_run("demo", overrides=["run.name=small", "run.dir=run", "train.steps=20", "train.decay_steps=20"])
    logs_folder(Path("run")).mkdir(parents=True, exist_ok=True)
    return config.model_copy(update={"track": config.track.model_copy(update={"hook": command})})


def observer_of(command: str) -> HookObserver:
    return HookObserver(config_of(command), step=0, ranks=4)


def save(observer: HookObserver, step: int) -> Path:
    folder = step_folder(checkpoints_folder(Path("run")), step=step)
    folder.mkdir(parents=True)
    observer.on_step(step_result(step=step, loss=2.5))
    observer.before_save()
    observer.on_step(step_result(step=step + 1, loss=9.0))  # while the save goes on in the background
    observer.on_save(Save(step, folder, seconds=0.1))
    return folder


def finish(observer: HookObserver, *, asked: Callable[[], bool] = lambda: False) -> None:
    observer.close("FINISHED")
    observer.finish(asked=asked, terminal=Terminal())


def events() -> list[str]:
    return Path("events").read_text().splitlines()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def wait_for_event(name: str) -> None:
    file = Path("events")
    wait_until(
        lambda: file.exists() and f"{name}|" in file.read_text(),
        lambda: f"{name} is not told",
        seconds=20,
        pause_seconds=0.01,
    )


def wait_for_end(pid: int) -> None:
    wait_until(lambda: not is_alive(pid), lambda: f"{pid} lives", seconds=20, pause_seconds=0.01)


def test_each_event_is_told_in_its_order() -> None:
    observer = observer_of(TELL)
    wait_for_event("started")
    save(observer, 4)
    wait_for_event("saved")
    observer.on_rollback(4)
    finish(observer)
    assert events() == [
        "started|0||small: started, from step 1 to 20 on 4 ranks",
        "saved|4|step_0000004|small: saved step 4, loss 2.5000",
        "rolled_back|4|step_0000004|small: rolled back, training has diverged and goes on from step 4",
        "finished|4|step_0000004|small: finished, the newest checkpoint is that of step 4",
    ]
    assert [line[24:] for line in hook_log(Path("run")).read_text().splitlines()][1] == "saved step 4, loss 2.5000"


def test_the_command_has_absolute_paths_and_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAINSHORT_RANK", "TRAINSHORT_COMMAND", ENDS_TOLD):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WEBHOOK", "https://somewhere")
    finish(observer_of("env >environment"))
    told = dict(line.split("=", 1) for line in Path("environment").read_text().splitlines() if "=" in line)
    assert told["TRAINSHORT_RUN_DIR"] == os.path.abspath("run")
    assert (told["TRAINSHORT_RUN_NAME"], told["WEBHOOK"]) == ("small", "https://somewhere")
    assert not {"TRAINSHORT_RANK", "TRAINSHORT_COMMAND", ENDS_TOLD, "RANK"} & {*told}


def test_a_slow_command_keeps_its_checkpoints_and_the_newest(caplog: pytest.LogCaptureFixture) -> None:
    observer = observer_of(WAIT)
    first = [save(observer, step) for step in (4, 8)]
    assert observer.checkpoints_in_use() == [first[-1]], "one of a save waits, beside what is told of the start"
    assert warnings_of(caplog) == ["track.hook is not run at 'saved' of step 4: it still runs for another event"]
    Path("go").touch()
    finish(observer)
    assert [event.split("|")[:2] for event in events()] == [["started", "0"], ["saved", "8"], ["finished", "8"]]
    assert not observer.checkpoints_in_use()


def test_saves_that_a_rollback_removes_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    observer = observer_of(WAIT)
    save(observer, 8)
    observer.on_rollback(4)
    assert warnings_of(caplog) == ["track.hook is not run at 'saved' of step 8: the checkpoint is removed"]
    Path("go").touch()
    finish(observer)
    assert [event.split("|")[0] for event in events()] == ["started", "rolled_back", "finished"]


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "SUPERSEDED"])
def test_an_early_end_waits_a_while_and_kills(
    status: hook.Status, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDS_TOLD, "1")
    monkeypatch.setitem(hook.LAST_SECONDS, status, 0.2)  # type: ignore[index]
    observer = observer_of(f"sleep 1000 & echo $! >child; {TELL}; wait")
    wait_for_event("started")
    save(observer, 4)
    observer.close(status)
    assert warnings_of(caplog) == [
        "track.hook did not end at 'started' of step 0: killed",
        "track.hook is not run at 'saved' of step 4: it ran too long for another event",
    ]
    wait_for_end(int(Path("child").read_text()))


def test_a_finished_run_waits_until_somebody_asks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    observer = observer_of(WAIT)
    wait_for_event("started")
    finish(observer, asked=lambda: True)
    assert caplog.messages == [
        "training has ended: waiting for track.hook, for at most 1h00m",
        "track.hook did not end at 'started' of step 0: killed",
        "track.hook is not run at 'finished' of step 0: it ran too long for another event",
    ]


def test_a_finished_run_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(hook.LAST_SECONDS, "FINISHED", 0.2)  # type: ignore[index]
    observer = observer_of("sleep 1000")
    finish(observer)
    assert warnings_of(caplog)[0] == "track.hook did not end at 'started' of step 0: killed"


def test_a_failing_command_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    finish(observer_of("echo something; exit 4"))
    finish(observer_of("kill -9 $$"))
    finish(observer_of("kill -40 $$"))  # which has no name
    how = "track.hook failed at {!r} of step 0 ({}): see run/logs/hook.log"
    assert warnings_of(caplog) == [
        how.format(event, why) for why in ("exit code 4", "signal 9", "signal 40") for event in ("started", "finished")
    ]
    assert hook_log(Path("run")).read_text().count("something\n") == 2
    caplog.clear()
    finish(observer_of("#" * (1 << 18)))
    assert warnings_of(caplog)[0].startswith("track.hook could not be run at 'started' of step 0: [Errno 7]")


@pytest.mark.parametrize("log", ["/dev/full", "."])
def test_a_log_that_cannot_be_written_stops_no_message(log: str) -> None:
    config = config_of(TELL)
    hook_log(Path("run")).symlink_to(log)
    tell_end(config, code=1, stopped=False)
    assert events() == ["failed|0||small: failed, nothing is saved"]


def test_what_the_last_command_leaves_running_lives_on() -> None:
    tell_end(config_of(f"({WAIT}; echo done >>events) &"), code=0, stopped=False)
    wait_for_event("stopped")
    Path("go").touch()
    wait_until(lambda: events()[-1] == "done", lambda: "it was killed with the command", seconds=20)


def test_ends_are_left_to_who_started_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS_TOLD, "1")
    finish(observer_of(TELL))
    assert [event.split("|")[0] for event in events()] == ["started"]


@pytest.mark.parametrize(
    ("saved", "code", "stopped", "event"),
    [
        (20, 0, False, "finished|20|step_0000020|small: finished, the newest checkpoint is that of step 20"),
        (20, 130, True, "finished|20|step_0000020|small: finished, the newest checkpoint is that of step 20"),
        (8, 0, False, "stopped|8|step_0000008|small: stopped, the newest checkpoint is that of step 8"),
        (8, 130, True, "stopped|8|step_0000008|small: stopped, the newest checkpoint is that of step 8"),
        (None, 3, False, "failed|0||small: failed, nothing is saved: the loss is nan"),
    ],
)
def test_the_launcher_tells_how_ranks_ended(saved: int | None, code: int, stopped: bool, event: str) -> None:
    config = config_of(TELL)
    rank_log(logs_folder(Path("run")), rank=0).write_text(
        "error: an older one\nstep 1\nerror: the loss is nan\n  why\n"
    )
    if saved:
        step_folder(checkpoints_folder(Path("run")), step=saved).mkdir(parents=True)
    tell_end(config, code=code, stopped=stopped)
    assert events() == [event]


def test_the_launcher_waits_a_minute_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hook, "UNSAID_SECONDS", 0.05)
    tell_end(config_of("sleep 0.2"), code=0, stopped=False)
    assert caplog.messages == ["waiting for track.hook"]
    monkeypatch.setattr(hook, "LAUNCHER_SECONDS", 0.2)
    tell_end(config_of("sleep 1000 & echo $! >child; wait"), code=0, stopped=False)
    assert caplog.messages[1:] == ["waiting for track.hook", "track.hook did not end at 'stopped' within 0 s: killed"]
    wait_for_end(int(Path("child").read_text()))


@pytest.mark.parametrize("last", ["next: trainshort evaluate run", "error: the loss is nan"])
def test_what_the_command_said_is_not_a_starts_last_word(last: str) -> None:
    config_of(TELL)
    begins, log = "2026-11-29 08:45:28+00:00  small in run", FollowedLog(Path("run"))
    after = ("waiting for track.hook", "track.hook failed at 'failed' of step 0 (exit code 4): see run/logs/hook.log")
    for words, has_ended in (((last, *after), True), (after, False)):
        rank_log(logs_folder(Path("run")), rank=0).write_text("\n".join([begins, "step 1/10", *words, ""]))
        log.update()
        assert log.has_ended == has_ended
        assert [*log.warnings][-1] == after[-1]


def test_the_launcher_tells_no_error_of_an_earlier_start() -> None:
    log = rank_log(logs_folder(Path("run")), rank=0)
    config = config_of(TELL)
    log.write_text("error: an older one\n2026-11-29 08:45:28+00:00  small in run\nstep 1\n")
    tell_end(config, code=3, stopped=False)
    assert events() == ["failed|0||small: failed, nothing is saved"]


def test_the_launcher_says_nothing_of_a_newer_start() -> None:
    config = config_of(TELL)
    begin_incarnation(Path("run"))  # by this process, which lives
    tell_end(config, code=1, stopped=False)
    tell_end(config.model_copy(update={"track": load_run("demo").track}), code=0, stopped=False)
    assert not Path("events").exists()


def test_commands_with_a_secret_or_a_nul_are_refused() -> None:
    with pytest.raises(InputError) as error:
        load_run("demo", overrides=["track.hook='curl -u me:abc123 https://somewhere'"])
    assert "track.hook contains a secret, 'curl -u me:*** https://somewhere'" in str(error.value)
    with pytest.raises(InputError) as error:
        load_run("demo", overrides=["track.hook='curl -d @- https://hooks.slack.com/services/T0/B0/abc123'"])
    assert "contains a secret, 'curl -d @- https://hooks.slack.com/services/***', which" in str(error.value)
    with pytest.raises(InputError, match="track.hook has a NUL"):
        load_run("demo", overrides=['track.hook="echo \\0"'])
    load_run("demo", overrides=["track.hook='curl -u me:$PASSWORD https://somewhere'"])
