"""Requests fail before and after they arrive, and senders are killed between them: everything is logged once.

The store here keeps every point that it gets, unlike MLflow's, which drop what they have already.
"""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.paths import spool_folder
from training.tracking.client import TrackingTarget
from training.tracking.events import SENDERS
from training.tracking.replay import FILE_LANE, LOG_LANE, Refusal, Replay
from training.tracking.spool import SpoolWriter, spool_files
from training.tracking.store import Store


class Killed(BaseException):
    """The sender's process ends here."""


class Chaos:
    """Decides what happens to each request."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ends = False

    def request(self, apply: Any) -> Any:
        """Answer a request, or lose it, or lose its answer, or kill the sender after it."""
        luck = 1.0 if self.ends else self.random.random()
        if luck < 0.2:
            raise ConnectionError("lost before it arrived")
        answer = apply()
        if luck < 0.4:
            raise ConnectionError("the answer was lost")
        if luck < 0.5:
            raise Killed
        return answer


class FakeRun:
    """A run of the store."""

    def __init__(self, number: int, *, start_time: int, run_name: str, tags: dict[str, str]) -> None:
        self.info = SimpleNamespace(
            run_id=f"run{number}", start_time=start_time, experiment_id="1", status="RUNNING", lifecycle_stage="active"
        )
        self.name = run_name
        self.data = SimpleNamespace(tags=dict(tags), params={})
        self.points: list[tuple[str, int, float]] = []


class FakeClient:
    """A store in memory with the methods of MLflow's client."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.runs: dict[str, FakeRun] = {}
        self.artifacts: list[str] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment_id: str, **fields: Any) -> FakeRun:
        def make() -> FakeRun:
            run = FakeRun(len(self.runs), **fields)
            self.runs[run.info.run_id] = run
            return run

        run: FakeRun = self.chaos.request(make)
        return run

    def search_runs(self, experiment_ids: list[str], *, filter_string: str, max_results: int) -> list[FakeRun]:
        key, _, value = filter_string.partition(" = ")
        name = key.removeprefix("tags.").strip("`")
        return [run for run in self.runs.values() if run.data.tags.get(name) == value.strip("'")]

    def get_run(self, run_id: str) -> FakeRun:
        return self.runs[run_id]

    def update_run(self, run_id: str, *, status: str) -> None:
        self.chaos.request(lambda: setattr(self.runs[run_id].info, "status", status))

    def set_terminated(self, run_id: str, *, status: str, end_time: int) -> None:
        self.update_run(run_id, status=status)

    def log_batch(self, run_id: str, *, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        run = self.runs[run_id]

        def log() -> None:
            run.points += [(metric.key, metric.step, metric.value) for metric in metrics]
            run.data.params |= {param.key: param.value for param in params}
            run.data.tags |= {tag.key: tag.value for tag in tags}

        self.chaos.request(log)

    def log_artifact(self, run_id: str, path: str, *, artifact_path: str | None) -> None:
        self.chaos.request(lambda: self.artifacts.append(Path(path).read_text()))


def spool_start(run_dir: Path, number: int, steps: range, *, ends: bool) -> None:
    """Spool a start that takes some steps."""
    start = {"kind": "start", "time_ms": 1000, "name": "a", "experiment": "e", "user": "me", "uri": None}
    writer = SpoolWriter(run_dir, role="train", on_problem=lambda _: None)
    writer.put({**start, "params": {"layout": str(number)}, "tags": {}, "listed_tags": {"hosts": f"h{number}"}})
    kept = str(writer.keep_file(run_dir / "config.yaml"))
    writer.put({"kind": "artifact", "time_ms": 1, "path": kept, "folder": None})
    for step in steps:
        values = {"loss": float(step), "rate": 1.0}
        writer.put({"kind": "metrics", "time_ms": 1000 * step, "step": step, "values": values})
        writer.put({"kind": "metrics", "time_ms": 2000 * step, "step": None, "values": {f"cpu{number}": 1.0}})
    if ends:
        writer.put({"kind": "finish", "time_ms": 9, "status": "FINISHED"})
    writer.close()


def spool_evaluation(run_dir: Path) -> None:
    """Spool a run below the run, and metrics of one step twice."""
    writer = SpoolWriter(run_dir, role="added", on_problem=lambda _: None)
    nested = {"kind": "nested", "time_ms": 9, "name": "n", "began_ms": 5, "status": "KILLED", "params": {"a": "1"}}
    writer.put({**nested, "tags": {}, "points": []})
    for value in (7.0, 6.0):  # measured twice: both count
        writer.put({"kind": "metrics", "time_ms": 9, "step": 5, "values": {"perplexity": value}, "again": True})
    writer.close()


def store_of(folder: Path, chaos: Chaos, patch: pytest.MonkeyPatch) -> tuple[Path, FakeClient, TrackingTarget]:
    """Return a new run folder, its store, and what names it."""
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("text")
    client = FakeClient(chaos)
    patch.setattr("training.tracking.client.import_client", lambda: lambda tracking_uri: client)
    return run_dir, client, TrackingTarget(run_dir, Store("http://host", "track.uri"))


def refused(refusal: Refusal) -> None:
    raise AssertionError(refusal)


@pytest.mark.parametrize("seed", range(6))
def test_lost_requests_and_kills_log_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chaos = Chaos(seed)
    run_dir, client, target = store_of(tmp_path, chaos, monkeypatch)
    spool_start(run_dir, 0, range(1, 41), ends=False)  # killed after a checkpoint of step 30
    spool_start(run_dir, 1, range(31, 81), ends=True)
    spool_evaluation(run_dir)
    # two processes, of which one sends at a time, and then the other
    senders = [Replay(target, own=None, on_refusal=refused) for _ in range(2)]
    for attempt in range(400):
        chaos.ends = attempt == 399
        number = chaos.random.randrange(2)
        try:
            if all([senders[number].send(lane) for lane in (LOG_LANE, FILE_LANE)]):
                break
        except ConnectionError:
            continue
        except Killed:
            senders[number] = Replay(target, own=None, on_refusal=refused)
    assert len(client.runs) == 2
    run, nested = client.runs.values()
    points = Counter((key, step) for key, step, _ in run.points)
    assert {(key, step) for key, step in points if key in ("loss", "rate")} == {
        (key, step) for key in ("loss", "rate") for step in range(1, 81)
    }
    assert points.pop(("perplexity", 5)) == 2
    assert {*points.values()} == {1}
    assert len([key for key, _ in points if key.startswith("cpu")]) == 40 + 50
    assert (run.info.status, run.data.params) == ("FINISHED", {"layout": "0"})
    assert (run.data.tags["hosts"], run.data.tags["resumed.layout"]) == ('["h0", "h1"]', "1")
    assert (nested.name, nested.info.status, nested.data.tags["mlflow.parentRunId"]) == ("n", "KILLED", run.info.run_id)
    assert {*client.artifacts} == {"text"}
    assert spool_files(run_dir) == []
    assert list((spool_folder(run_dir) / "files").rglob("*.yaml")) == []


def test_two_processes_that_send_in_turn_know_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chaos = Chaos(0)
    chaos.ends = True
    run_dir, client, target = store_of(tmp_path, chaos, monkeypatch)
    senders = [Replay(target, own=None, on_refusal=refused) for _ in range(2)]
    spool_start(run_dir, 0, range(1, 3), ends=False)
    assert senders[0].send(LOG_LANE)
    writer = SpoolWriter(run_dir, role="train", on_problem=lambda _: None)
    for number, (name, step) in enumerate((("loss", 3), ("rare", 3), ("loss", 4))):
        writer.put({"kind": "metrics", "time_ms": 1, "step": step, "values": {name: 1.0}})
        assert senders[number % 2].send(LOG_LANE)
    spool_start(run_dir, 1, range(3, 6), ends=True)
    writer.put({"kind": "metrics", "time_ms": 2, "step": 3, "values": {"rare": 1.0}})
    assert senders[1].send(LOG_LANE)
    [run] = client.runs.values()
    assert sorted(step for key, step, _ in run.points if key == "loss") == [1, 2, 3, 4, 5]
    assert [step for key, step, _ in run.points if key == "rare"] == [3]
    assert (run.info.status, senders[1].waiting()) == ("FINISHED", 2)
    writer.close()
    assert senders[1].send(FILE_LANE)
    assert (client.artifacts, senders[0].waiting(), spool_files(run_dir)) == (["text"] * 2, 0, [])


def test_only_the_last_request_says_that_all_have_arrived() -> None:
    requests: list[tuple[int, int]] = []

    class Client:
        def log_batch(self, run_id: str, *, metrics: Any, tags: Any) -> None:
            requests.append((len(metrics), len(tags)))

    points = [("loss", 1.0, 1, step) for step in range(2500)]
    SENDERS["metrics"](Client(), "run", {"points": points, "tags": {"a": "1", "b": "2"}})
    *before, last = requests
    assert [tags for _, tags in before] == [0] * len(before)
    assert (last[1], sum(count for count, _ in requests)) == (2, 2500)
    assert all(count + tags <= 1000 for count, tags in requests)
