"""The evaluate command: what it refuses before it loads a model, and what it writes to the run folder."""

import errno
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from configs.errors import InputError
from configs.protocols import WindowProtocol, parse_protocol
from tests.support.command_line import Call
from tests.support.evaluation import (
    CERTIFICATE,
    PROVENANCE,
    VOCAB,
    UniformModel,
    evaluate,
    opened_checkpoint,
    report_of,
    text_of,
    uniform_run,
)
from tests.support.small_run import small_run
from training.evaluation.markdown import format_table
from training.evaluation.perplexity import PerplexityResult
from training.evaluation.plot import draw_plot
from training.evaluation.provenance import evaluated_model
from training.evaluation.report import build_report, word_perplexity, write_report
from training.evaluation.sweep import plan_measurements
from training.evaluation.text import EvaluationText
from training.tracking.tracker import MlflowTracker

NEWEST = ("report.json", "report.md", "perplexity.png")
KEPT = ("held-out.json", "held-out.md", "held-out.png")


@pytest.fixture
def run_dir(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    return uniform_run(tmp_path / "runs" / "one", run_values, monkeypatch)


def test_by_default_the_runs_lengths_and_protocols_are_measured(run_dir: Path) -> None:
    report = evaluate(run_dir, lengths=None, protocols=None, data=None)
    folder = run_dir / "evaluation"
    named = folder / "step_0000007"
    assert {path.name for path in folder.iterdir()} == {*NEWEST, named.name}
    assert {path.name for path in named.iterdir()} == {*KEPT}
    assert json.loads((folder / "report.json").read_text()) == report
    assert json.loads((named / "held-out.json").read_text()) == report
    assert report["checkpoint"] == str(run_dir / "checkpoints" / "step_0000007")
    assert (report["train_length"], report["step"], report["position"]) == (32, 7, "alibi")
    assert (report["attention"], report["precision"]) == ("sdpa", "fp32")
    assert "- evaluated with attention sdpa in fp32\n" in (folder / "report.md").read_text()
    assert report["unigram_perplexity"] == 40.0
    assert report["data"] == {"name": "held-out", "tokens": 1000, "words": 100, "bytes": 5000}
    assert [(r["length"], r["protocol"], r["stride"], r["tokens"]) for r in report["results"]] == [
        (32, "nonoverlapping", 32, 31 * 32),
        (64, "nonoverlapping", 64, 15 * 64),
        (128, "nonoverlapping", 128, 7 * 128),
        (256, "nonoverlapping", 256, 3 * 256),
    ]
    for result in report["results"]:
        assert result["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert result["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
        # ten tokens a word
        assert result["word_perplexity"] == pytest.approx(VOCAB**10, rel=1e-4)
    assert not (run_dir / "mlflow_run.json").exists()


def test_lengths_of_two_evaluations_share_no_tokens(run_dir: Path) -> None:
    for lengths in ((32, 64), (32, 256)):
        evaluate(run_dir, lengths=lengths, protocols=("last:8",), same_tokens=True)
    kept = run_dir / "evaluation" / "step_0000007" / "held-out.json"
    results = {each["length"]: each for each in json.loads(kept.read_text())["results"]}
    assert results[32]["tokens"] == results[256]["tokens"] != results[64]["tokens"]
    assert {length: each["windows_end_every"] for length, each in results.items()} == {32: 256, 64: 64, 256: 256}
    shown = kept.with_suffix(".md").read_text()
    assert shown.count(" * |") == 3
    assert "the lengths of a protocol in one evaluation scored the same tokens" in shown


def test_evaluations_at_once_keep_a_whole_report_each(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, drawn = threading.Barrier(2), []

    class Waiting(UniformModel):
        def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
            measured.wait(60)  # both evaluations reach their end at the same time
            return super().losses(tokens, last=last)

    def draw(report: dict[str, Any], path: Path) -> Path:
        drawn.append(report["step"])
        time.sleep(0.2)  # long enough for the other one to come between
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(report["step"]))
        return path

    monkeypatch.setattr(
        "training.evaluation.run.open_checkpoint",
        lambda path: opened_checkpoint(path, small_run(), step=int(path.name[-1])),
    )
    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: Waiting())
    monkeypatch.setattr("training.evaluation.folder.draw_plot", draw)
    folder = run_dir / "evaluation"
    with ThreadPoolExecutor(2) as threads:
        done = [
            threads.submit(
                evaluate,
                run_dir / "checkpoints" / f"step_000000{step}",
                lengths=(999,),
                protocols=("nonoverlapping",),
                data=None,
            )
            for step in (3, 7)
        ]
    reports = {report["step"]: report for report in (each.result() for each in done)}
    for step, report in reports.items():
        named = folder / f"step_000000{step}"
        assert json.loads((named / "held-out.json").read_text()) == report
        assert f"step_000000{step}`" in (named / "held-out.md").read_text()
    newest = drawn[-1]
    assert json.loads((folder / "report.json").read_text()) == reports[newest]
    assert f"step_000000{newest}`" in (folder / "report.md").read_text()
    assert (folder / "perplexity.png").read_text() == str(newest)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_report_that_cannot_be_written_is_still_shown(
    run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr("training.evaluation.folder.write_report", full)
    answer = trainshort("evaluate", str(run_dir), "--json")
    assert answer.code == 3
    assert json.loads(answer.out)["step"] == 7
    assert answer.error.splitlines()[-1].startswith("error: somewhere cannot be written (No space left on device): ")


def test_paths_are_shown_as_they_were_typed(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, trainshort: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = uniform_run(Path("runs/one"), run_values, monkeypatch)
    checkpoint = run_dir / "checkpoints" / "step_0000007"
    for given in (run_dir, checkpoint, tmp_path / run_dir):
        answer = trainshort("evaluate", str(given), "--lengths", "32")
        shown = checkpoint if given != tmp_path / run_dir else tmp_path / checkpoint
        assert answer.out.startswith(f"{shown}, trained at 32 tokens\n")
        assert "report: runs/one/evaluation/step_0000007/held-out.md\n" in answer.error
    report = json.loads((run_dir / "evaluation" / "report.json").read_text())
    assert report["checkpoint"] == str(tmp_path / checkpoint), "it may be read elsewhere"


@pytest.mark.parametrize("taken", ["evaluation", "evaluation/step_0000007"])
def test_the_reports_folder_is_tried_before_a_model_is_loaded(
    run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: pytest.fail("the model was loaded"))
    (run_dir / taken).parent.mkdir(exist_ok=True)
    (run_dir / taken).write_text("a file")
    before = sorted(run_dir.rglob("*"))
    answer = trainshort("evaluate", str(run_dir))
    assert (answer.code, answer.out) == (3, "")
    assert answer.error.startswith(f"error: evaluation folder {run_dir / taken} cannot be written (")
    assert sorted(run_dir.rglob("*")) == before


def test_any_name_of_a_text_or_run_folder_can_be_reported(tmp_path: Path) -> None:
    name = "a$x^{$ [red] :smile: \U0001f604 日本 `b``\n\udcff" + "long" * 20
    report = build_report(
        [PerplexityResult(32, WindowProtocol(stride=None), 992, 2.0)],
        model=evaluated_model(opened_checkpoint(Path(name), small_run(), step=7), CERTIFICATE),
        text=EvaluationText(name, np.zeros(1000, dtype=np.int64), 100, None),
        provenance=PROVENANCE,
    )
    json_path, table_path = write_report(report, tmp_path, name="book", plot="book.png")
    assert draw_plot(report, tmp_path / "plot.png").stat().st_size > 1000
    assert json.loads(json_path.read_text()) == report
    shown = name.replace("\n", "\\n").replace("\udcff", "\\udcff")
    assert f"- text: ``` {shown} ```, 1,000 tokens" in table_path.read_text()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_results_are_added_to_the_runs_mlflow_run(run_dir: Path) -> None:
    tracker = MlflowTracker(run_dir, name="one", experiment="tests", uri=None)
    tracker.start({}, run_dir / "config.yaml")
    tracker.finish("FINISHED")
    report = evaluate(run_dir, lengths=(64,), protocols=("nonoverlapping", "sliding:16"), context=True)
    assert (report["verdict"]["usable_length"], report["verdict"]["effective_context"]) == (64, 1)
    connection = sqlite3.connect(run_dir.parent / "mlflow.db")
    query = "select key, step, round(value, 3) from metrics join runs using (run_uuid) where name {} 'one' order by key"
    rows, nested = (connection.execute(query.format(sign)).fetchall() for sign in ("=", "!="))
    statuses = connection.execute("select name, status from runs order by start_time").fetchall()
    parents = "select run_uuid from runs where name = 'one'", "select value from tags where key = 'mlflow.parentRunId'"
    parent, named = (connection.execute(query).fetchall() for query in parents)
    connection.close()
    assert statuses == [("one", "FINISHED"), ("evaluate step_0000007, held-out", "FINISHED")]
    assert parent == named
    assert nested == [
        ("nonoverlapping/loss", 64, 3.466),
        ("nonoverlapping/perplexity", 64, 32.0),
        ("sliding_16/loss", 64, 3.466),
        ("sliding_16/perplexity", 64, 32.0),
    ]
    assert rows == [
        ("evaluation/held-out/effective_context", 7, 1.0),
        ("evaluation/held-out/nonoverlapping/64/bits_per_byte", 7, 1.0),  # 5 bits in the 5 bytes of a token
        ("evaluation/held-out/nonoverlapping/64/loss", 7, 3.466),
        ("evaluation/held-out/nonoverlapping/64/perplexity", 7, 32.0),
        ("evaluation/held-out/nonoverlapping/64/standard_error", 7, 0.0),
        ("evaluation/held-out/nonoverlapping/step_0000007/perplexity", 64, 32.0),
        ("evaluation/held-out/sliding_16/64/bits_per_byte", 7, 1.0),
        ("evaluation/held-out/sliding_16/64/loss", 7, 3.466),
        ("evaluation/held-out/sliding_16/64/perplexity", 7, 32.0),
        ("evaluation/held-out/sliding_16/64/standard_error", 7, 0.0),
        ("evaluation/held-out/sliding_16/step_0000007/perplexity", 64, 32.0),
        ("evaluation/held-out/usable_length", 7, 64.0),
    ]
    artifacts = run_dir.parent / "mlartifacts"
    assert {path.name for path in artifacts.rglob("evaluation/step_0000007/*")} == {*KEPT}


def test_what_nobody_goes_on_with_is_removed(run_dir: Path, trainshort: Call) -> None:
    old, new, mine = "partial-" + "0" * 32 + ".npz", "partial-" + "1" * 32 + ".npz", "partial-mine.npz"
    unfinished = f".{old}.01234567.tmp"
    folders = [run_dir / "evaluation" / name for name in ("step_0000003", "step_0000007")]
    for folder in folders:
        folder.mkdir(parents=True)
        for name in (old, new, mine, unfinished):
            (folder / name).touch()
            if name != new:
                os.utime(folder / name, (0, time.time() - 31 * 86400))
    assert trainshort("evaluate", str(run_dir), "--lengths", "32").code == 0
    for folder in folders:
        assert {path.name for path in folder.glob("*partial-*")} == {new, mine}


@pytest.mark.parametrize(
    ("lengths", "protocols", "message"),
    [
        ((32, 1000, 2000), None, "the text has 1000 tokens, too short for length 1000, 2000: use lengths up to 999"),
        ((64, 32), ("sliding:40",), "sliding:40 moves further than its window of 32 tokens"),
        ((0,), None, "length must be 1 or more, got 0"),
        (None, ("rolling",), "protocol 'rolling' is not known"),
    ],
)
def test_wrong_lengths_are_refused_before_a_model_is_loaded(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...] | None,
    protocols: tuple[str, ...] | None,
    message: str,
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("training.evaluation.run.load_single", load)
    with pytest.raises(InputError, match=message):
        evaluate(run_dir, lengths=lengths, protocols=protocols, data=None)
    assert not (run_dir / "evaluation").exists()


def test_each_length_up_to_the_longest_is_measured_once() -> None:
    planned = plan_measurements((999, 10, 999), [parse_protocol("nonoverlapping")] * 2, tokens=1000)
    assert [(measurement.length, measurement.inputs) for measurement in planned] == [(999, 999), (10, 990)]


def test_word_perplexity_is_the_texts_likelihood_per_word() -> None:
    # 12 tokens of loss 0.5 in 4 words: exp(12 * 0.5 / 4)
    assert word_perplexity(0.5, tokens=12, words=4) == pytest.approx(math.exp(1.5))
    assert word_perplexity(0.5, tokens=12, words=0) is None
    assert word_perplexity(5.0, tokens=100_000, words=1) is None


def test_report_leaves_out_unknown_words_and_baseline(tmp_path: Path) -> None:
    bare = report_of(
        PerplexityResult(32, WindowProtocol(stride=None), 992, 2.0), of=text_of(1000, words=None, unigram=None)
    )
    assert bare["unigram_perplexity"] is None
    assert "word_perplexity" not in bare["results"][0]
    json_path, table_path = write_report(bare, tmp_path / "new", name="report", plot="perplexity.png")
    assert json.loads(json_path.read_text()) == bare
    assert "per word" not in table_path.read_text()
    assert "unigram" not in table_path.read_text()


def test_table_has_a_row_per_result() -> None:
    table = format_table(
        report_of(
            PerplexityResult(32, WindowProtocol(stride=None), 992, 2.0),
            PerplexityResult(80, WindowProtocol(stride=16), 976, 1.5),
        ),
        plot="held-out.png",
    )
    assert "\n![Perplexity against length](held-out.png)\n" in table
    assert (
        "- evaluated 2026-01-02T03:04:05Z by trainshort 0.2.0, torch 2.13.0, commit 4ea461ed7004: "
        "`trainshort evaluate 'a run'`\n"
    ) in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| 32 | 1 | nonoverlapping | 992 | 2.0000 | 7.39 | 4.852e+08 | 0.7213 |",
        "| 80 | 2.5 | sliding:16 | 976 | 1.5000 | 4.48 | 3.269e+06 | 0.5410 |",
    ]


@pytest.mark.parametrize("curve", [lambda n: 30.0 - n, lambda n: 20.0 * 3**n, lambda n: 20.0])
def test_plot_is_drawn_for_any_curve(tmp_path: Path, curve: Callable[[int], float]) -> None:
    results = [
        PerplexityResult(32 * 2**n, protocol, 1000, math.log(curve(n)))
        for protocol in (WindowProtocol(stride=None), WindowProtocol(stride=16))
        for n in range(4)
    ]
    for number, shown in enumerate((results, results[:4], results[:1])):
        path = draw_plot(report_of(*shown, of=text_of(1000, unigram=25.0)), tmp_path / f"{number}.png")
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 400
        assert picture.std() > 0.01
