"""`trainshort track sync`: which folders it goes through, and how long it goes on."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import InputError, MachineError
from configs.paths import chain_file
from launch.slurm.query import Job
from launch.slurm.record import Chain, write_chain
from tests.support.command_line import Call, refused
from tests.support.run_folders import make_run
from training.tracking.record import RunRecord, write_record
from training.tracking.sync import Synced


@pytest.fixture
def run(folder: Path) -> Path:
    """A run folder; the folders of commands are relative to the folder around it."""
    return make_run(folder / "run").relative_to(folder)


def begin(run: Path) -> None:
    write_record(run, RunRecord("abc", None))


def synced(run: Path, *, sent: int, is_open: bool) -> Synced:
    status = "RUNNING" if is_open else "KILLED"
    return Synced(run, "sqlite:///x", "abc", sent=sent, refused=(), status=status, is_open=is_open)


def test_it_goes_on_until_the_jobs_have_ended(trainshort: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits has no MLflow run yet, and at its time limit a run ends though its job waits again."""
    chain_file(run).parent.mkdir()
    write_chain(run, Chain("run", {"train": "7", "export": "8"}, 1, "noon"))
    states: Iterator[str] = iter(["PENDING", "PENDING", "RUNNING", "PENDING", "no answer", "COMPLETED"])
    sends: Iterator[tuple[int, bool]] = iter([(5, True), (3, False), (0, False), (2, False)])
    pauses: list[float] = []

    def find_jobs(chain: Chain) -> dict[str, Job]:
        if (state := next(states)) == "no answer":
            raise MachineError("SLURM does not answer")
        return {"train": Job("7", "COMPLETED"), "export": Job("8", state)}

    def sync(folder: Path) -> Synced:
        sent, is_open = next(sends)
        return synced(folder, sent=sent, is_open=is_open)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            begin(run)

    monkeypatch.setattr("launch.slurm.record.find_jobs", find_jobs)
    monkeypatch.setattr("launch.slurm.record.shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("training.tracking.sync.sync_run", sync)
    monkeypatch.setattr("launch.commands.track.time.sleep", sleep)
    answer = trainshort("track", "sync", "run", "--every", "60")
    assert (answer.code, pauses) == (0, [60.0] * 5)
    assert [line.partition(";")[0] for line in answer.out.splitlines()] == [
        f"run: sent {count} records" for count in (5, 3, 2)
    ]
    assert next(sends, None) is None
    assert next(states, None) is None


def test_each_outage_is_told_once_while_it_goes_on(
    trainshort: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = iter(["down", "down", "up", "down", "end"])

    def sync(folder: Path) -> Synced:
        if (state := next(rounds)) == "down":
            raise MachineError("MLflow cannot take run")
        return synced(folder, sent=1, is_open=state == "up")

    begin(run)
    monkeypatch.setattr("training.tracking.sync.sync_run", sync)
    monkeypatch.setattr("launch.commands.track.time.sleep", lambda seconds: None)
    answer = trainshort("track", "sync", "run", "--every", "60")
    assert (answer.code, answer.out.count("sent 1 record")) == (0, 2)
    assert answer.error == 2 * "MLflow cannot take run; it is tried again every 60 s\n"


def test_jobs_of_another_machine_hold_nothing_up(trainshort: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(trainshort, "track", "sync", "run", "--every", "60").startswith("run holds nothing for MLflow")
    begin(run)
    chain_file(run).parent.mkdir()
    write_chain(run, Chain("run", {"train": "7"}, 1, "noon"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("training.tracking.sync.sync_run", lambda folder: synced(folder, sent=0, is_open=False))
    answer = trainshort("track", "sync", "run", "--every", "60")
    assert (answer.code, answer.out) == (0, "run: nothing was left to send; run abc of sqlite:///x is KILLED\n")


def test_a_folder_without_records_keeps_no_other_back(
    trainshort: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"first": InputError("first holds nothing"), "second": MachineError("second is not reached")}

    def sync(folder: Path) -> Synced:
        if str(folder) in errors:
            raise errors[str(folder)]
        return synced(folder, sent=1, is_open=False)

    monkeypatch.setattr("training.tracking.sync.sync_run", sync)
    answer = trainshort("track", "sync", "first", "second", "run", "run")
    assert (answer.code, answer.error) == (2, "error: first holds nothing; second is not reached\n")
    assert answer.out == "run: sent 1 record; run abc of sqlite:///x is KILLED\n"
    answer = trainshort("track", "sync", "second", "run", "--json")
    document = json.loads(answer.out)
    assert (answer.code, document["problems"], len(document["runs"])) == (3, ["second is not reached"], 1)


def test_a_refused_folder_does_not_end_what_goes_on(
    trainshort: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = iter([True, True, False])

    def sync(folder: Path) -> Synced:
        if folder != run:
            raise InputError("first holds nothing")
        return synced(folder, sent=1, is_open=next(rounds))

    monkeypatch.setattr("training.tracking.sync.sync_run", sync)
    monkeypatch.setattr("launch.commands.track.time.sleep", lambda seconds: None)
    answer = trainshort("track", "sync", "first", "run", "--every", "60")
    assert (answer.code, answer.out.count("sent 1 record")) == (2, 3)
    assert answer.error == "first holds nothing; the other runs go on\nerror: first holds nothing\n"
