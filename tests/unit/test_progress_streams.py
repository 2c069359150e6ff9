"""Where progress is written: a terminal, a file, the log of rank 0."""

import logging
import os
import pty
import re
import select
import signal
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.terminal import CLEAR_LINE, Terminal
from launch.failure import report_failure
from launch.show.streams import can_redraw, following, ready_streams
from launch.show.train import following_rank, say_end
from parallel.start import ProcessRank
from tests.support.progress import progress_run, ready_to
from tests.support.run_folders import make_run, start_run
from tests.support.steps import step_result
from training.progress_log import ProgressLog


def seen(reader: int) -> str:
    """Return what was written to a terminal."""
    text = b""
    while select.select([reader], [], [], 0.0)[0]:
        try:
            text += os.read(reader, 10_000)
        except OSError:  # its other end is closed
            break
    return text.decode()


@pytest.fixture
def time_limit() -> Iterator[None]:
    """End a test that waits for ever."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a step waits for the terminal"))
    signal.setitimer(signal.ITIMER_REAL, 20, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def screen() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 80 columns: what reads it, and what a program writes to."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    yield reader, writer
    os.close(reader)


def test_the_log_has_the_same_lines_as_the_terminal(
    tmp_path: Path, screen: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = screen
    caplog.set_level(logging.INFO)
    logger, library = logging.getLogger("training.anything"), logging.getLogger("library.anything")
    with following(tmp_path / "rank_0.log", descriptor=writer, environ={"TERM": "xterm"}) as terminal:
        progress = ProgressLog(progress_run("train.log_every=1"), first_step=0, best=None, terminal=terminal)
        logger.info("starting")
        library.info("not ours")
        library.warning("a library warns\nof %s", "a\x1b[2J")
        progress.on_step(step_result(validation_loss=4.0, validation_seconds=1.0))
        progress.before_validation(2)
        logger.debug("only with --verbose")
    shown = seen(reader)
    lines = (tmp_path / "rank_0.log").read_text()
    assert [line.partition(" ")[0] for line in lines.splitlines()] == ["starting", "a", "of", "step", "validation"]
    assert "\x1b" not in lines
    assert lines.splitlines()[2] == "of a\\x1b[2J"
    # What stays on the screen: what follows the last erasure of each line.
    assert [line.rpartition(CLEAR_LINE)[2] for line in shown.split("\r\n")] == [*lines.splitlines(), ""]
    assert "validating" in shown
    assert all(len(line) < 80 for line in re.split(r"\r\n|\r\x1b\[2K", shown))


def test_quiet_hides_progress_and_verbose_shows_all(tmp_path: Path, screen: tuple[int, int]) -> None:
    reader, writer = screen
    root, logger = logging.getLogger(), logging.getLogger("training.anything")
    before = root.level, set(root.handlers)
    said = {}
    for level in (logging.WARNING, logging.DEBUG):
        log = tmp_path / f"{level}.log"
        root.setLevel(level)
        with following(log, descriptor=os.dup(writer), environ={"TERM": "xterm"}) as terminal:
            ProgressLog(progress_run(), first_step=0, best=None, terminal=terminal).on_step(step_result())
            logger.warning("warning")
            logger.debug("debug")
            logging.getLogger("library").info("a library")
        root.setLevel(before[0])
        said[level] = (seen(reader), log.read_text())
    os.close(writer)
    shown, logged = said[logging.WARNING]
    assert shown.replace(CLEAR_LINE, "") == "warning\r\n"
    assert [line.split()[0] for line in logged.splitlines()] == ["step", "warning"]
    shown, logged = said[logging.DEBUG]
    assert [line.split()[0] for line in logged.splitlines()] == ["step", "warning", "debug", "a"]
    assert "a library\r\n" in shown
    assert (root.level, set(root.handlers)) == before


def test_lines_are_redrawn_only_on_a_capable_terminal(tmp_path: Path, screen: tuple[int, int]) -> None:
    with open(screen[1], "w") as terminal, (tmp_path / "file").open("w") as file:
        assert can_redraw(terminal, environ={"TERM": "xterm-256color"})
        assert not any(can_redraw(terminal, environ={"TERM": name}) for name in ("dumb", "unknown", ""))
        assert not can_redraw(file, environ={"TERM": "xterm"})
        plain = Terminal(terminal, redraws=False)
        plain.show("live")
        plain.emit(logging.makeLogRecord({"msg": "line"}))
        assert seen(screen[0]) == "line\r\n"


def test_the_first_rank_of_torchrun_tells_what_a_launcher_would(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    run = progress_run("train.steps=400", f"run.dir={tmp_path / 'run'}")
    monkeypatch.setattr("launch.show.train.make_ready", lambda config, **_: ready_to(config, world_size=4))
    place = ProcessRank(0, 4, 0, "env://", "torchrun")
    with following_rank(run, replace(place, rank=1), environ={}) as terminal:
        assert terminal is None, "the other ranks have nothing to say"
    assert not (tmp_path / "run").exists()
    with following_rank(run, place, environ={}):
        logging.getLogger("training.run").info("training")
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(f"  demo in {tmp_path / 'run'}")
    assert said[-3:] == ["importing torch and DeepSpeed", "training", "to continue: start the same job again"]
    assert (tmp_path / "run" / "logs" / "rank_0.log").read_text().splitlines() == said
    with following_rank(run, replace(place, starter="local"), environ={}):
        pass
    assert capsys.readouterr().err == "", "the launcher says it"


@pytest.mark.parametrize("code", [1, 3, 130])
def test_a_failed_start_says_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int) -> None:
    caplog.set_level(logging.INFO)
    run_dir = make_run(tmp_path / "run", last=9, saved=(4, 6))
    run = progress_run("train.steps=10", f"run.dir={run_dir}")
    say_end(run, code=InputError.exit_code, again="again")
    assert caplog.messages == [], "the same command would fail again"
    start_run(run_dir)
    say_end(run, code=code, again="again")
    assert caplog.messages == [], "a newer start trains"
    start_run(run_dir, process_started=1)
    say_end(run, code=code, again="again")
    assert caplog.messages == [
        "ended without saving: steps 7 to 9 are lost",
        f"{run_dir}/checkpoints/step_0000006 stays",
        "to continue: again",
    ]
    run_dir.rename(tmp_path / "moved")
    caplog.clear()
    say_end(run, code=code, again="again")
    assert caplog.messages == [
        f"{run_dir} cannot be found, nor what was saved in it: move it back, or set run.dir to its place"
    ]


def test_a_batch_jobs_log_gets_each_line_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = tmp_path / "rank_0.log"  # where srun sends the output of rank 0
    with log.open("a") as output, following(log, descriptor=os.dup(output.fileno()), environ={"TERM": "xterm"}):
        logging.getLogger("training.run").info("training")
    assert log.read_text() == "training\n"


@pytest.mark.parametrize("kind", ["a pipe", "a terminal", "a raw terminal", "a stopped terminal"])
@pytest.mark.usefixtures("time_limit")
def test_a_step_never_waits_for_who_reads_the_terminal(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = os.pipe() if kind == "a pipe" else pty.openpty()
    if kind == "a raw terminal":
        tty.setraw(writer)
    if kind == "a stopped terminal":
        termios.tcflow(writer, termios.TCOOFF)  # as Ctrl-S does
    log, steps = tmp_path / "rank_0.log", 3000
    with following(log, descriptor=os.dup(writer), environ={"TERM": "xterm"}) as terminal:
        run = progress_run("train.log_every=1", f"train.steps={steps + 1}")
        progress = ProgressLog(run, first_step=0, best=None, terminal=terminal)
        for step in range(1, steps + 1):
            progress.on_step(step_result(step=step))
        assert len(log.read_text().splitlines()) == steps, "the log has all"
        assert os.get_blocking(writer), "the user's shell has the same open file"
        if kind == "a stopped terminal":
            termios.tcflow(writer, termios.TCOON)
        early = seen(reader)
        progress.on_step(step_result(step=steps + 1, loss=8.125))
        late = seen(reader)
        progress.close("FINISHED")
    shown = re.split(f"\r\n|\n|{re.escape(CLEAR_LINE)}", early + late)
    last = f"step {steps + 1}/{steps + 1}  loss 8.125"
    assert [line for line in shown if last in line], "it recovers"
    assert all(line.startswith("step ") and "loss" in line for line in shown if line), "no line is torn"
    os.close(reader)
    os.close(writer)


def test_the_report_of_an_error_is_in_the_log_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = tmp_path / "rank_0.log"
    with pytest.raises(InputError) as error, following(log, descriptor=None, environ={}):
        raise InputError("the data do not fit")
    report_failure(str(error.value), code=2)
    ready_streams()  # as the next command does
    report_failure("another command", code=2)
    assert log.read_text() == "error: the data do not fit\n"
    assert capsys.readouterr().err == "error: the data do not fit\nerror: another command\n"


def test_a_closed_terminal_or_a_full_disk_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = pty.openpty()
    (tmp_path / "full").symlink_to("/dev/full")
    with following(tmp_path / "full", descriptor=writer, environ={"TERM": "xterm"}) as terminal:
        progress = ProgressLog(progress_run("train.log_every=1"), first_step=0, best=None, terminal=terminal)
        os.close(reader)
        began = time.perf_counter()
        for step in range(1, 101):
            progress.on_step(step_result(step=step))
        progress.close("FINISHED")
    assert time.perf_counter() - began < 0.5, "5 ms a step, a hundred times what it takes"
    assert capsys.readouterr().err == ""
