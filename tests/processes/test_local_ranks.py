"""The local launcher starts ranks, forwards signals, and kills its ranks when it dies. Here a rank is a shell."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import local, rank_failure
from launch.local import STOPPED_BY_HAND, start_ranks
from launch.machine import core_count, gpu_count
from parallel import die_with_parent
from tests.support.processes import is_alive
from training.host_memory import OomKills, host_limit

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def bash(script: str) -> list[str]:
    return ["bash", "-c", script]


def start(script: str, logs: Path, *, ranks: int = 3, grace_seconds: float = 0.3, **more: str) -> int:
    environment = {**ENVIRONMENT, **more}
    return start_ranks(
        bash(script),
        ranks=ranks,
        logs=logs,
        environ=environment,
        metrics=logs / "metrics.jsonl",
        explain_memory=lambda rank, how: f"rank {rank} {how}",
        grace_seconds=grace_seconds,
    )


def wait_until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


LAUNCHER = """
import os, sys
from pathlib import Path
from launch.local import start_ranks
metrics, logs, *command = sys.argv[1:]
more = {"metrics": Path(metrics), "explain_memory": str, "grace_seconds": 0.3}
sys.exit(start_ranks(command, ranks=2, logs=Path(logs), environ=os.environ, **more))
"""


def heed_hangups() -> None:
    """Heed SIGHUP also where the tests run under nohup: the launcher keeps it ignored if it starts so."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


PRESSED = "saving, press again to end without saving\n"
Launch = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a launcher with two ranks; each writes its pid to the test's folder when it is ready."""
    started: list[subprocess.Popen[bytes]] = []

    def start_launcher(script: str, *, has_trained: bool = True) -> "subprocess.Popen[bytes]":
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("of an earlier start\n")
        replaced = f"echo >{tmp_path}/.new$$; mv {tmp_path}/.new$$ {metrics}" if has_trained else "true"
        ready = f'trap "exit 9" HUP; {script}; {replaced}; echo $$ >{tmp_path}/.pid$TRAINSHORT_RANK; '
        ready += f"mv {tmp_path}/.pid$TRAINSHORT_RANK {tmp_path}/pid$TRAINSHORT_RANK; while true; do sleep 0.05; done"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", LAUNCHER, str(metrics), str(tmp_path / "logs"), *bash(ready)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=heed_hangups,
        )
        started.append(process)
        wait_until(lambda: (tmp_path / "pid0").exists() and (tmp_path / "pid1").exists())
        return process

    yield start_launcher
    # After a failed test: kill its launcher, and each rank's process group.
    for process in started:
        process.kill()
        process.communicate()
    for pid in (int(file.read_text()) for file in tmp_path.glob("pid[01]")):
        if is_alive(pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid{rank}").read_text()) for rank in (0, 1)]


def end(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=20)
    return process.returncode, output.decode()


def test_each_rank_has_a_number_and_a_log_one_has_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = '[[ $TRAINSHORT_TERMINAL ]] && echo "told by $TRAINSHORT_RANK" >&$TRAINSHORT_TERMINAL; '
    script += 'echo "$TRAINSHORT_RANK of $TRAINSHORT_RANKS, $OMP_NUM_THREADS"; test ! -e "$TRAINSHORT_RENDEZVOUS"'
    script += f' && test -d "$(dirname "$TRAINSHORT_RENDEZVOUS")" && echo "$TRAINSHORT_RENDEZVOUS" >>{tmp_path}/meet'
    assert start(script, tmp_path) == 0
    assert start(script, tmp_path, ranks=2, OMP_NUM_THREADS="7") == 0
    threads = max(1, core_count() // 3)
    assert capfd.readouterr() == ("", "told by 0\n" * 2)
    assert (tmp_path / "rank_0.log").read_text() == f"0 of 3, {threads}\n0 of 2, 7\n"
    assert (tmp_path / "rank_1.log").read_text() == f"1 of 3, {threads}\n1 of 2, 7\n"
    assert (tmp_path / "rank_2.log").read_text() == f"2 of 3, {threads}\n"
    meeting = (tmp_path / "meet").read_text().splitlines()
    assert len(meeting) == 5
    assert len(set(meeting)) == 2
    assert not any(Path(path).parent.exists() for path in meeting)


def test_results_of_the_first_rank_go_where_they_are_wanted(tmp_path: Path) -> None:
    with (tmp_path / "results").open("w") as results:
        code = start_ranks(
            bash('echo "found by $TRAINSHORT_RANK"; echo said >&2'),
            ranks=2,
            logs=tmp_path,
            environ=ENVIRONMENT,
            metrics=tmp_path / "metrics.jsonl",
            explain_memory=lambda rank, how: f"rank {rank} {how}",
            results=results,
        )
    assert code == 0
    assert (tmp_path / "results").read_text() == "found by 0\n"
    assert (tmp_path / "rank_0.log").read_text() == "said\n"
    assert (tmp_path / "rank_1.log").read_text() == "found by 1\nsaid\n"


def test_a_rank_that_says_it_was_stopped_is_no_failure(launch: Launch) -> None:
    process = launch('trap "exit $((TRAINSHORT_RANK ? 4 : 130))" TERM')  # 4: it has lost the first one
    process.send_signal(signal.SIGINT)
    assert end(process) == (STOPPED_BY_HAND, PRESSED)


def test_a_failed_rank_is_named_with_the_end_of_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_2.log").write_text("of an earlier start\n")
    script = "[[ $TRAINSHORT_RANK == 2 ]] && { echo nothing fits; exit 5; }; sleep 60"
    began = time.monotonic()
    assert start(script, tmp_path) == 1
    assert time.monotonic() - began < 10
    error = capfd.readouterr().err
    assert error == f"error: rank 2 ended with exit code 5; the end of {tmp_path}/rank_2.log:\n  nothing fits\n"
    assert start(f"rm -f {tmp_path}/rank_*.log; exit 5", tmp_path) == 1, "its log was removed"
    assert re.fullmatch(r"error: rank \d ended with exit code 5; the end of \S+:\n", capfd.readouterr().err)


@pytest.mark.parametrize("code", [2, 3])
def test_the_cause_decides_the_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int) -> None:
    # Rank 1 has the error, but the others lose their connection and end before it.
    script = f"if [[ $TRAINSHORT_RANK == 1 ]]; then sleep 0.2; echo 'error: no'; exit {code}; else exit 1; fi"
    assert start(script, tmp_path, grace_seconds=5) == code
    assert capfd.readouterr().err == "error: rank 1: no\n"


def test_an_error_of_rank_0_is_shown_once_with_its_details(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    says = "echo 'Traceback (most recent call last):'; echo 'error: two'; echo '  lines'; echo '    of it'; echo later"
    assert start(f"[[ $TRAINSHORT_RANK == 0 ]] && {{ {says}; exit 2; }}; sleep 60", tmp_path) == 2
    assert capfd.readouterr().err == "error: two\n  lines\n    of it\n"
    # the nan of a loss is an error in words too, and its code is 1
    assert start("[[ $TRAINSHORT_RANK == 2 ]] && { echo 'error: the loss is nan'; exit 1; }; sleep 60", tmp_path) == 1
    assert capfd.readouterr().err == "error: rank 2: the loss is nan\n"


def test_an_unexpected_exception_is_ours_and_its_log_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    script = "[[ $TRAINSHORT_RANK == 1 ]] && { python -c 'raise KeyError(7)'; echo later; exit 1; }; sleep 60"
    ours = "error: rank 1 failed, which is a bug in trainshort: KeyError: 7\n"
    ours += f"  please report it with the whole traceback, in {tmp_path}/rank_1.log"
    assert start(script, tmp_path) == 1
    assert capfd.readouterr().err == f"{ours}\n"
    caplog.set_level(logging.DEBUG)
    assert start(script, tmp_path) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"{ours}; the end of {tmp_path}/rank_1.log:\n")
    assert "\n  Traceback (most recent call last):\n" in error


def test_the_rank_that_failed_by_itself_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Rank 2 has the error. The others notice that its connection is closed, and end before it.
    lost = 'echo "error: rank $TRAINSHORT_RANK lost its connection"; exit 4'
    script = f"[[ $TRAINSHORT_RANK == 2 ]] && {{ sleep 0.3; echo 'error: boom'; exit 1; }}; {lost}"
    assert start(script, tmp_path, grace_seconds=5) == 1
    assert capfd.readouterr().err == "error: rank 2: boom\n"
    assert start(lost, tmp_path) == 1
    assert re.fullmatch(r"error: rank [012] lost its connection\n", capfd.readouterr().err)


def test_a_killed_rank_is_named_before_ranks_that_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_failure, "oom_kills", lambda: OomKills(0, 0))  # whatever else this machine does
    monkeypatch.setattr(local, "oom_kills", lambda: OomKills(0, 0))
    script = "[[ $TRAINSHORT_RANK == 2 ]] && { sleep 0.3; kill -KILL $$; }; exit 1"
    assert start(script, tmp_path, grace_seconds=5) == 3
    first, reason, held, limit = capfd.readouterr().err.splitlines()
    assert first == "error: rank 2 ended with signal 9 (SIGKILL), which the launcher did not send"
    assert reason.startswith("  the kernel counts no kill for lack of memory: a person did it")
    assert re.fullmatch(r"  held: [0-9.]+ [MG]B at most, by the largest rank", held)
    assert limit == f"  limit: {host_limit()}"


MOST_LIKELY = "ended with signal 9 (SIGKILL), most likely from the kernel, for lack of memory"


@pytest.mark.parametrize(
    ("kills", "words"),
    [
        ((OomKills(4, 9), OomKills(5, 10)), "ran out of memory: the kernel killed it, with signal 9 (SIGKILL)"),
        ((OomKills(4, 9), OomKills(4, 10)), MOST_LIKELY),  # somebody's process on this machine
        ((OomKills(None, 9), OomKills(None, 10)), MOST_LIKELY),
        ((OomKills(None, None), OomKills(None, None)), MOST_LIKELY),
    ],
)
def test_a_rank_that_the_kernel_killed_ran_out_of_memory(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kills: tuple[OomKills, OomKills],
    words: str,
) -> None:
    monkeypatch.setattr(local, "oom_kills", lambda: kills[0])
    monkeypatch.setattr(rank_failure, "oom_kills", lambda: kills[1])
    assert start("[[ $TRAINSHORT_RANK == 1 ]] && kill -KILL $$; sleep 60", tmp_path) == 3
    assert capfd.readouterr().err.startswith(f"error: rank 1 {words}\n  held: ")


def test_a_rank_that_c_code_aborted_may_have_run_out_of_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """[[ $TRAINSHORT_RANK == 1 ]] && { echo "what():  std::bad_alloc"; kill -ABRT $$; }; exit 4"""
    assert start(script, tmp_path, grace_seconds=10) == 3
    assert capfd.readouterr().err.startswith("error: rank 1 ran out of memory and was aborted, with signal 6 (SIGABRT)")


def test_a_rank_that_waited_in_vain_says_for_what(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = "WorkNCCL(SeqNum=8, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=1800000)"
    told = f"[rank1]:[E] Watchdog caught collective operation timeout: {work} ran for 1800027 milliseconds before ..."
    script = f"""[[ $TRAINSHORT_RANK == 1 ]] || sleep 60; echo "{told}"; seq 99; kill -ABRT $$"""
    assert start(script, tmp_path) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("error: rank 1 waited 30m00s for the other ranks in a collective (ALLREDUCE) and gave up: ")
    assert second.startswith("  the rank that hangs is the one whose log ends otherwise, beside ")


def test_ranks_that_ignore_sigterm_are_killed_after_a_failure(tmp_path: Path) -> None:
    ready = f"until [[ -s {tmp_path}/pid ]]; do sleep 0.05; done"
    script = (
        f"[[ $TRAINSHORT_RANK == 1 ]] && {{ {ready}; exit 1; }}; "
        f"trap '' TERM; echo $$ >{tmp_path}/pid; while true; do sleep 1; done"
    )
    assert start(script, tmp_path, ranks=2) == 1
    assert not is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_lets_every_rank_save(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    # Saving takes longer than the grace after a failure, and must not be cut short.
    save = f"sleep 1; echo saved >{tmp_path}/saved$TRAINSHORT_RANK; exit 0"
    process = launch(f"trap '{save}' TERM; trap '' INT")
    process.send_signal(number)
    asked = "press again" if number == signal.SIGINT else f"asked by {number.name}; press Ctrl-C"
    assert end(process) == (0, f"saving, {asked} to end without saving\n")
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def test_a_second_ctrl_c_does_not_wait(launch: Launch, tmp_path: Path) -> None:
    process = launch(f"trap 'echo x >>{tmp_path}/asked' TERM")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: (tmp_path / "asked").exists())
    process.send_signal(signal.SIGINT)
    assert end(process) == (STOPPED_BY_HAND, PRESSED)
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_a_stop_before_anything_can_be_saved_is_exit_130(launch: Launch) -> None:
    process = launch("true", has_trained=False)  # a rank without a trap: TERM ends it at once
    process.send_signal(signal.SIGTERM)
    assert end(process) == (STOPPED_BY_HAND, "stopping, asked by SIGTERM; press Ctrl-C to end at once\n")


def test_a_terminals_ctrl_c_reaches_the_launcher_alone(launch: Launch, tmp_path: Path) -> None:
    process = launch("trap 'exit 0' TERM; trap 'exit 7' INT")
    groups = {os.getpgid(pid) for pid in pids(tmp_path)}
    assert len(groups) == 2
    assert os.getpgid(process.pid) not in groups
    process.send_signal(signal.SIGINT)
    assert end(process) == (0, PRESSED)


def test_ranks_die_with_a_killed_launcher(launch: Launch, tmp_path: Path) -> None:
    process = launch("trap '' TERM INT HUP")
    ranks = pids(tmp_path)
    assert all(is_alive(pid) for pid in ranks)
    process.kill()
    process.wait(timeout=10)
    wait_until(lambda: not any(is_alive(pid) for pid in ranks), seconds=5)


def test_a_rank_whose_launcher_is_gone_never_starts(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    command = [sys.executable, "-I", "-S", die_with_parent.__file__, "1", "touch", str(ran)]
    assert subprocess.run(command, check=False).returncode == 1
    assert not ran.exists()


def test_the_launcher_imports_no_torch() -> None:
    code = "import sys, launch.local, launch.slurm.status, parallel.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 3),
        *((text, 0) for text in ("", " ", "-1", "NoDevFiles", "none", "None", "void", "no", ",0", "3", "1,1", "1,01")),
        *((text, 1) for text in (" 1 ", "0,-1,2", "0,none", "2,9,1", "0,GPU-aa", "MIG-aa,MIG-bb", "GPU-aa,1")),
        *((text, 2) for text in ("1,2", "0, 2", "GPU-aa,GPU-bb")),
        *((text, 3) for text in ("0,1,2,3", "GPU-a,GPU-b,GPU-c,GPU-d")),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(tmp_path: Path, visible: str | None, expected: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpu_count(environment, devices=tmp_path) == expected
