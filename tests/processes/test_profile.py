"""`profile` takes steps of a prepared run on its ranks, reports where the time goes, and leaves the run alone."""

import gzip
import json
from pathlib import Path

import pytest

from tests.support.command_line import run_here
from tests.support.data import write_book
from tests.support.processes import quick, run


def test_a_profile_reports_two_ranks_and_leaves_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_book(tmp_path)
    layout = ("parallel.tensor=2", "parallel.pipeline=1", "run.dir=run")
    assert run_here(*quick("profile", *layout)) == 2
    said, error = capsys.readouterr()
    assert said == ""
    assert "run `trainshort prepare demo" in error
    assert run_here(*quick("prepare", *layout)) == 0
    before = {path for path in tmp_path.rglob("*") if "index" not in path.parts}
    done = run(tmp_path, "profile", *layout)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "profile"
    made = {path for path in tmp_path.rglob("*") if "index" not in path.parts} - before
    assert made - {tmp_path / "run"} == {
        folder,
        folder / "logs",
        *(folder / "logs" / f"rank_{rank}.log" for rank in (0, 1)),
        folder / "profile.json",
        folder / "trace.json.gz",
    }
    document = json.loads((folder / "profile.json").read_text())
    times = {row["name"]: row["milliseconds"] for row in document["categories"]}
    assert sum(times.values()) == pytest.approx(document["profiled_step_milliseconds"])
    assert {"matrix products", "attention", "loss", "optimizer", "communication", "data and host"} <= set(times)
    assert times.get("other", 0) < 0.02 * document["profiled_step_milliseconds"]
    assert 0 < document["model_flops_utilization_causal"] < document["model_flops_utilization"]
    assert (document["ranks"], document["profiled_steps"]) == (2, 3)
    for words in ("matrix products", "largest tensors", "run/profile/trace.json.gz", "ui.perfetto.dev"):
        assert words in done.stdout
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as trace:
        assert any(event["name"] == "aten::mm" for event in json.load(trace)["traceEvents"] if "name" in event)
