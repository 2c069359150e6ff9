"""Files of a run folder with values of wrong types, as a program or a hand may leave them: one line, no traceback."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from tests.support.command_line import Call, refused
from tests.support.compared_runs import add_report, make_run
from tests.support.measured_runs import add_harness, add_retrieval
from tests.support.started_runs import whole_run
from training.evaluation.kept import read_report
from training.harness.kept import read_harness
from training.harness.report import write_results
from training.incarnation import newest_incarnation

WRONG = ("x", [], {}, True, float("nan"), None)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.comparison.plot.save_figure", lambda figure, path, software: path)


def with_value(document: dict[str, Any], key: str, value: Any) -> str:
    """Return a document as JSON in which a key has another value; a key of each result has `results.` before it."""
    outer, _, inner = key.rpartition(".")
    changed: dict[str, Any] = json.loads(json.dumps(document))
    part = {"": changed, "results": changed["results"][0], "data": changed["data"]}[outer]
    part[inner] = value
    return json.dumps(changed)


def test_a_report_with_a_value_of_a_wrong_type_is_named(trainshort: Call) -> None:
    report = add_report(make_run(Path("run")), {32: 20.0})
    document = json.loads(report.read_text())
    texts = ("checkpoint", "data.name", "results.protocol")
    numbers = ("step", "train_length", "results.length", "results.perplexity")
    for key in (*texts, *numbers):
        for value in WRONG[key in texts :]:
            report.write_text(with_value(document, key, value))
            where = key.replace("results.", "results.0.")
            with pytest.raises(InputError, match=rf"{report} is not a report of `trainshort evaluate` \({where}: "):
                read_report(report)
    report.write_text(with_value(document, "results.tokens", "x"))
    assert f"{report} is not a report of `trainshort evaluate` (results.0.tokens: " in refused(
        trainshort, "report", "run"
    )
    report.write_text(with_value(document, "results", []))
    assert "(results: " in refused(trainshort, "compare", "run")
    report.write_text(with_value(document, "another", "x"))
    assert read_report(report)["another"] == "x", "a key that nobody reads"


def test_measurements_with_wrong_values_are_named(trainshort: Call) -> None:
    run_dir = make_run(Path("run"))
    for file, command, key in (
        (add_harness(run_dir, [{}]), "harness", "max_length"),
        (add_retrieval(run_dir, {"single": {32: {0.0: 1.0}}}), "retrieval", "recall"),
    ):
        whole = file.read_text()
        document = json.loads(whole)
        document["results"][0][key] = "x"
        file.write_text(json.dumps(document))
        assert f"{file} is not a report of `trainshort {command}` (results.0.{key}: " in refused(
            trainshort, "report", "run"
        )
        file.write_text(whole)


def test_new_results_replace_a_damaged_file_of_tasks() -> None:
    file = add_harness(make_run(Path("run")), [{"version": [1, 0]}])
    report = read_harness(file)  # a task may have any version
    broken = {**report, "results": [{**report["results"][0], "max_length": "x", "task": "another"}]}
    file.write_text(json.dumps(broken))
    write_results(report, file.parent.parent)
    assert read_harness(file)["results"] == report["results"]
    (aside,) = file.parent.glob("results.until-*.json")
    assert json.loads(aside.read_text()) == broken


@pytest.mark.parametrize("value", ["x", [1], float("nan"), "missing"])
def test_tokens_of_a_wrong_type_are_left_out(trainshort: Call, value: Any) -> None:
    metrics = make_run(Path("run")) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1] = {**lines[-1], "tokens_seen": value}  # a step with a validation
    if value == "missing":
        del lines[-1]["tokens_seen"]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    answer = trainshort("compare", "run", "--json")
    assert answer.code == 0, answer
    (run,) = json.loads(answer.out)["runs"]
    assert (run["step"], run["tokens"]) == (10, None)
    assert trainshort("report", "run").code == 0


def test_a_start_with_wrong_values_is_no_start(trainshort: Call) -> None:
    run_dir = whole_run(Path("run"))
    file, environment = run_dir / "incarnation", run_dir / "environment.json"
    environment.write_text(json.dumps({"slurm": "x", "code": 1, "packages": [], "device": "cpu"}))
    start = {
        "number": 1,
        "token": "1-a",
        "host": "vm",
        "machine": "m",
        "pid": 1,
        "process_started": 1,
        "started_at": "x",
    }
    for changed in ({}, {"number": None}, {"host": 1}, {"started_at": None}, {"pid": "x"}):
        file.write_text(json.dumps({**start, **changed}))
        assert (newest_incarnation(run_dir) is None) == bool(changed), changed
        assert trainshort("watch", "run", "--once").code == 0
    certificates = run_dir / "certificates.jsonl"
    whole = certificates.read_text()
    for right, wrong in (
        ('"started_at"', '"another"'),
        ('"stage": 0', '"stage": null'),
        ('"ranks": [', '"ranks": -1, "x": ['),
    ):
        assert right in whole
        certificates.write_text(whole.replace(right, wrong))
        assert trainshort("report", "run").code == 0, wrong


def test_a_name_that_is_no_text_is_left_out(trainshort: Call) -> None:
    file = make_run(Path("run")) / "config.yaml"
    file.write_text(re.sub(r"name: run$", "name: .nan", file.read_text(), flags=re.MULTILINE))
    answer = trainshort("runs", "run", "--json")
    assert answer.code == 0, answer
    assert json.loads(answer.out)[0]["name"] is None
