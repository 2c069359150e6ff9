"""The command `retrieval`: what it refuses, what it writes, what it shows."""

import errno
import json
import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import matplotlib.image
import pytest

from data_pipeline.tokenizer import load_tokenizer
from tests.support.command_line import Call, refused
from tests.support.evaluation import TOKENIZER
from tests.support.recall_models import KnowsNothing, ReadingModel
from tests.support.spooled import attach_offline, begin_mlflow_run, spooled
from training.retrieval.report import retrieval_markdown

OLD_RUN = TOKENIZER.parents[1]
QUICK = ("--data", "text.txt", "--lengths", "40x,400", "--depths", "2", "--samples", "1")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was trained at 8 tokens, and a text; the test's working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD_RUN, "run")
    Path("text.txt").write_text("\n".join(topics.values())[:20_000], encoding="utf-8")
    return Path("run")


def test_a_trained_model_is_asked_and_the_report_kept(run_dir: Path, trainshort: Call) -> None:
    answer = trainshort("retrieval", "run", *QUICK, "--tasks", "single, multi-query")
    assert answer.code == 0, answer
    assert answer.out.startswith("run/checkpoints/step_0000002, trained at 8 tokens\n")
    rows = [line.split() for line in answer.out.splitlines()]
    assert [row[:4] for row in rows if row[:1] in (["single"], ["multi-query"])] == [
        ["single", "320", "40", "2"],
        ["single", "400", "50", "2"],
        ["multi-query", "320", "40", "2"],
        ["multi-query", "400", "50", "2"],
    ]
    assert "4/4  multi-query at 400: recall 0%, choice " in answer.error
    (markdown,) = run_dir.glob("evaluation/step_0000002/retrieval/text-*.md")
    assert answer.error.splitlines()[-1] == f"report: {markdown}"
    report = json.loads(markdown.with_suffix(".json").read_text())
    assert (report["step"], report["train_length"], report["position"], report["seed"]) == (2, 8, "alibi", 1)
    assert [(cell["task"], cell["length"], cell["depth"], cell["prompts"]) for cell in report["results"]] == [
        *(("single", length, depth, 1) for length in (320, 400) for depth in (0.0, 1.0)),
        *(("multi-query", length, None, 2) for length in (320, 400)),
    ]
    assert "| single | 320 | 40 | 2 | 0 % (0-66) |" in markdown.read_text()
    odd = {"checkpoint": "a `b`", "data": {"name": "`x`.txt", "tokens": 9}, "command": "trainshort `c`"}
    shown = retrieval_markdown({**report, **odd}, plot="x.png")
    assert "- checkpoint: `` a `b` `` (step 2)" in shown
    assert "- haystack: `` `x`.txt ``, 9 tokens" in shown
    assert ": `` trainshort `c` ``\n" in shown
    picture = matplotlib.image.imread(markdown.with_suffix(".png"))
    assert min(picture.shape[:2]) > 400
    again = trainshort("retrieval", "run", *QUICK, "--tasks", "single", "--json")
    first = [cell for cell in report["results"] if cell["task"] == "single"]
    assert json.loads(again.out)["results"] == first


def test_a_report_goes_to_mlflow_whole(run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_mlflow_run(run_dir)
    monkeypatch.setattr("training.tracking.tracker.attach", attach_offline)
    knows = KnowsNothing(load_tokenizer(TOKENIZER))
    monkeypatch.setattr("training.retrieval.run.load_single", lambda *_, **__: knows)
    assert trainshort("retrieval", "run", *QUICK, "--tasks", "single").code == 0
    (path,) = run_dir.glob("evaluation/step_0000002/retrieval/*.json")
    label, report = path.stem, json.loads(path.read_text())
    [metrics], [nested], [table] = (spooled(run_dir, kind=kind) for kind in ("metrics", "nested", "table"))
    by_length = {length: [each for each in report["results"] if each["length"] == length] for length in (320, 400)}
    means = {
        (key, length): fmean(cell[key] for cell in cells)
        for length, cells in by_length.items()
        for key in ("recall", "choice", "log_probability", "margin")
    }
    names = {f"retrieval/{label}/single/{length}/{key}": mean for (key, length), mean in means.items()}
    assert (metrics["step"], metrics["values"]) == (2, names)
    assert (nested["name"], nested["status"]) == (f"retrieval step_0000002, {label}", "FINISHED")
    assert (nested["params"]["lengths"], nested["params"]["prompts"]) == ("[320, 400]", "4")
    points = {(key.removeprefix("single/"), step): value for key, value, _, step in nested["points"]}
    assert points == means
    files = spooled(run_dir, kind="artifact")
    assert {each["folder"] for each in files} == {"evaluation/step_0000002/retrieval"}
    assert [Path(each["path"]).name for each in files] == [f"{label}.{ending}" for ending in ("json", "md", "png")]
    assert json.loads((run_dir / files[0]["path"]).read_text()) == report
    assert table["artifact"] == f"retrieval/{label}.json"
    columns, rows = table["table"]["columns"], table["table"]["data"]
    cells = [{key: each[key] for key in ("length", "depth", "recall", "choice")} for each in report["results"]]
    assert [{key: row[columns.index(key)] for key in cells[0]} for row in rows] == cells
    [[dataset]] = [event["datasets"] for event in spooled(run_dir, kind="inputs")]
    assert (dataset["name"], dataset["context"]) == ("text.txt", "evaluation")


def test_what_cannot_be_asked_is_one_line(run_dir: Path, trainshort: Call) -> None:
    for options, message in (
        (("--data", "no.txt"), "data source no.txt "),
        ((), "data is not prepared in data "),
        (("--tasks", "passkey,needles"), "task 'needles' is not known: use passkey, single, multi-key, "),
        (("--lengths", "1k"), "--lengths must be tokens, or training lengths as in 2x, separated by commas, got '1k'"),
        (("--depths", "1"), "--depths must be from 2 to 101, got 1: use 5"),
        (("--seed", "-1"), "seed must be from 0 to 18446744073709551615, got -1: use 1"),
        (("--samples", "0"), "--samples must be a whole number from 1 to "),
        (
            ("--data", "text.txt", "--lengths", "8x"),
            "length 64 is too short for the needles and the question of multi-key (121), ",
        ),
        (("--data", "text.txt", "--lengths", "90000"), "the text has "),
    ):
        assert refused(trainshort, "retrieval", str(run_dir), *options).startswith(message)
    assert refused(trainshort, "retrieval", "nowhere").startswith("checkpoint nowhere does not exist")


def test_what_is_finished_is_kept_and_shown(run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(KnowsNothing):
        def next_logits(self, tokens: Any, cache: Any) -> Any:
            if tokens.shape[1] > 360:
                raise KeyboardInterrupt
            return super().next_logits(tokens, cache)

    begin_mlflow_run(run_dir)
    monkeypatch.setattr("training.tracking.tracker.attach", attach_offline)
    monkeypatch.setattr("training.retrieval.run.load_single", lambda *_, **__: Stopped(load_tokenizer(TOKENIZER)))
    answer = trainshort("retrieval", "run", *QUICK, "--tasks", "single")
    assert answer.code == 130
    assert "stopped early; what is finished is kept: " in answer.error
    (path,) = run_dir.glob("evaluation/step_0000002/retrieval/*.json")
    assert {cell["length"] for cell in json.loads(path.read_text())["results"]} == {320}
    path.write_text(kept := path.read_text().replace('"seed": 1,', '"seed": 2,'))
    answer = trainshort("retrieval", "run", *QUICK, "--tasks", "single")
    assert answer.code == 130
    assert path.read_text() == kept, "an earlier report stays"
    stopped = path.parent / "stopped" / path.name
    assert f"is kept: {stopped.with_suffix('.md')}" in answer.error
    assert json.loads(stopped.read_text())["seed"] == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    reading = ReadingModel(load_tokenizer(TOKENIZER))
    monkeypatch.setattr("training.retrieval.run.load_single", lambda *_, **__: reading)
    monkeypatch.setattr("training.retrieval.report.draw_retrieval", full)
    answer = trainshort("retrieval", "run", *QUICK, "--tasks", "single", "--json")
    assert answer.code == 3
    assert [cell["recall"] for cell in json.loads(answer.out)["results"]] == [1, 1, 1, 1]
    assert answer.error.splitlines()[-1].startswith("error: somewhere cannot be written (No space left on device): ")
    killed, again, unwritten = spooled(run_dir, kind="nested")
    assert [each["status"] for each in (killed, again, unwritten)] == ["KILLED", "KILLED", "FINISHED"]
    assert len(unwritten["points"]) == 2 * len(killed["points"]), "MLflow has what the disk does not take"
    assert len(spooled(run_dir, kind="table")) == 2
