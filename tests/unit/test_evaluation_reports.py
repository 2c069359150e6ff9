"""What the evaluation folder keeps: a report per checkpoint and text, progress, and what an interruption leaves."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import TrainshortError
from configs.protocols import WindowProtocol
from data_pipeline.documents import document_begins
from data_pipeline.text import identify_documents, identify_text
from data_pipeline.tokenizer import load_tokenizer
from tests.support import evaluation as support
from tests.support.command_line import Call
from tests.support.evaluation import (
    TOKENIZER,
    UniformModel,
    opened_checkpoint,
    report_of,
    text_of,
    uniform_run,
)
from training.evaluation.kept import text_label
from training.evaluation.markdown import format_table
from training.evaluation.perplexity import PerplexityResult
from training.evaluation.progress import EvaluationProgress
from training.evaluation.report import merge_reports

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def run_dir(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    def draw(_: object, path: Path) -> Path:  # drawing is what takes time
        path.write_text("a plot")
        return path

    monkeypatch.setattr("training.evaluation.folder.draw_plot", draw)
    return uniform_run(tmp_path / "one", run_values, monkeypatch)


@pytest.fixture
def evaluate(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Evaluate the run at some lengths, on the held-out text or a file."""

    def call(*lengths: int, protocol: str = "nonoverlapping", data: Path | None = None) -> dict[str, Any]:
        if data is not None:
            text = replace(text_of(1000), name=data.name, tokens=tokens_of(data))
            monkeypatch.setattr("training.evaluation.run.file_text", lambda *_: text)
        return support.evaluate(run_dir, lengths=lengths, protocols=(protocol,), data=data, command="trainshort x")

    return call


def tokens_of(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(load_tokenizer(TOKENIZER).encode(path.read_text()), np.int64)


def measured(path: Path) -> list[tuple[str, int, int]]:
    return [(each["protocol"], each["stride"], each["length"]) for each in json.loads(path.read_text())["results"]]


def test_a_checkpoint_keeps_every_length_and_protocol(run_dir: Path, evaluate: Evaluate) -> None:
    folder = run_dir / "evaluation"
    kept = folder / "step_0000007" / "held-out.json"
    evaluate(64)
    evaluate(32, protocol="sliding:8")
    newest = evaluate(128, 32)
    assert measured(kept) == [
        ("nonoverlapping", 32, 32),
        ("nonoverlapping", 64, 64),
        ("nonoverlapping", 128, 128),
        ("sliding", 8, 32),
    ]
    assert json.loads((folder / "report.json").read_text()) == newest
    assert measured(folder / "report.json") == [("nonoverlapping", 128, 128), ("nonoverlapping", 32, 32)]
    shown = kept.with_suffix(".md").read_text()
    assert "| 32 | 1 | sliding:8 |" in shown
    assert "- usable length: 128 tokens (128 in 95 % of the draws), within 1 % of the best perplexity, 32.00" in shown
    assert "![Perplexity against length](held-out.png)" in shown
    assert "![Perplexity against length](perplexity.png)" in (folder / "report.md").read_text()
    assert newest["command"] == "trainshort x"
    assert newest["versions"].keys() == {"trainshort", "torch", "commit"}


def test_results_of_other_weights_are_moved_aside(
    run_dir: Path, evaluate: Evaluate, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(64)
    folder = run_dir / "evaluation" / "step_0000007"
    trained_again = opened_checkpoint(run_dir / "checkpoints" / "step_0000007", run_values, step=7, sha256="2")
    monkeypatch.setattr("training.evaluation.run.open_checkpoint", lambda _: trained_again)
    report = evaluate(32)
    assert measured(folder / "held-out.json") == [("nonoverlapping", 32, 32)]
    (aside,) = folder.glob("held-out.until-*.json")
    assert measured(aside) == [("nonoverlapping", 64, 64)]
    (folder / "held-out.json").write_text("{")
    evaluate(32)
    assert json.loads((folder / "held-out.json").read_text())["weights_sha256"] == report["weights_sha256"]


def test_files_of_one_name_have_a_report_each(run_dir: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    files = [tmp_path / place / "My Book (2).txt" for place in "abc"]
    for file, text in zip(files, ("one text " * 40, "another text " * 40, "one text " * 40), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    folder = run_dir / "evaluation" / "step_0000007"
    evaluate(32, data=files[0])
    evaluate(32, data=files[1])
    evaluate(16, data=files[2])
    other = f"my-book-2-{hashlib.sha256(files[1].read_bytes()).hexdigest()[:8]}"
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{ending}" for name in ("my-book-2", other) for ending in ("json", "md", "png")
    }
    assert [length for *_, length in measured(folder / "my-book-2.json")] == [16, 32], "the same content elsewhere"
    files[1].write_text("now of other content " * 40)
    evaluate(64, data=files[1])
    assert [length for *_, length in measured(folder / f"{other}.json")] == [64], "the same path"
    assert json.loads((folder / f"{other}.json").read_text())["text_path"] == str(files[1])


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("book.txt", "book"),
        ("wiki.valid.jsonl.zst", "wiki-valid"),
        ("held-out", "held-out-01234567"),
        ("report.txt", "report-01234567"),
        ("日本.txt", "text"),
        ("Émile_1762.parquet", "emile_1762"),
        (f"{'long' * 60}.txt", "long" * 15),
    ],
)
def test_a_label_is_the_files_name(tmp_path: Path, name: str, label: str) -> None:
    report = report_of(of=replace(text_of(1000), name=name), text_path=f"/somewhere/{name}", text_sha256="01234567" * 8)
    assert text_label(report, tmp_path) == label


def test_a_texts_hash_is_that_of_its_bytes() -> None:
    text = "Two words,\n  tabs\t and \u65e5\u672c \U0001f604 that no piece spells.\n" * 30
    tokens = load_tokenizer(TOKENIZER).encode(text)
    ended = np.array([*tokens, load_tokenizer(TOKENIZER).end_of_document], np.int64)
    assert identify_text(ended, TOKENIZER).sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_texts_documents_have_a_hash_of_their_own() -> None:
    """It is of the bytes at which they begin, whatever the tokens; of one document there is none."""
    tokenizer = load_tokenizer(TOKENIZER)
    first, second, third = "One text.\n", "Another, with 日本 in it.\n", "A third."

    def identified(*documents: str, ends: bool = False) -> str | None:
        parts = [tokenizer.encode(text) + ([tokenizer.end_of_document] if ends else []) for text in documents]
        tokens, joins = np.concatenate(parts).astype(np.int64), np.cumsum([0, *map(len, parts[:-1])])
        begins = document_begins(tokens, joins=joins, end=tokenizer.end_of_document)
        return identify_documents(identify_text(tokens, TOKENIZER), tokens, TOKENIZER, begins=begins)

    masked = identified(first, second, third)
    assert masked == identified(first, second, third, ends=True) is not None
    others = [
        identified(first + second, third),
        identified(first, second + third),
        identified(first, second, "a third."),
    ]
    assert len({masked, *others, None}) == 5
    assert identified(first + second + third) is identified(first, ends=True) is None
    text = np.array(tokenizer.encode(first), np.int64)
    assert identify_documents(identify_text(text, TOKENIZER), text, TOKENIZER, begins=None) is None


def test_texts_cut_in_other_documents_are_not_one(run_dir: Path) -> None:
    result = PerplexityResult(32, WindowProtocol(stride=None), 900, 2.0)
    folder = run_dir / "evaluation"
    (folder / "step_0000007").mkdir(parents=True)

    def report(documents: str | None, path: str = "/a/book.txt") -> dict[str, Any]:
        text = replace(text_of(1000), name="book.txt")
        return report_of(result, of=text, text_path=path, text_sha256="33" * 32, documents_sha256=documents)

    whole, masked = report(None), report("44" * 32)
    assert (whole["documents_sha256"], masked["documents_sha256"]) == (None, "44" * 32)
    older = {key: value for key, value in masked.items() if key != "documents_sha256"}
    assert merge_reports(masked, report("44" * 32)) is not None
    for one, other in ((whole, masked), (masked, whole), (report("55" * 32), masked)):
        assert merge_reports(one, other) is None
    for newest in (whole, masked):  # as before, by the text alone
        assert merge_reports(older, newest) is not None
    (folder / "step_0000007" / "book.json").write_text(json.dumps(whole))
    labels = [text_label(report(documents, "/b/book.txt"), folder) for documents in (None, "44" * 32, "55" * 32)]
    assert labels == ["book", "book-44444444", "book-55555555"]
    assert text_label(report("44" * 32, "/a/book.txt"), folder) == "book", "the same file"
    (folder / "step_0000007" / "book.json").write_text(json.dumps(older))
    assert text_label(report("55" * 32, "/b/book.txt"), folder) == "book"


def test_reports_merge_only_at_one_precision() -> None:
    def result(length: int) -> PerplexityResult:
        return PerplexityResult(length, WindowProtocol(stride=None), 900, 2.0)

    first = report_of(result(32), result(64), date="2026-01-01T00:00:00Z", command="first")
    second = report_of(result(64), date="2026-01-02T00:00:00Z", command="second")
    merged = merge_reports(first, second)
    assert merged is not None
    assert [each["length"] for each in merged["results"]] == [32, 64]
    assert [each["date"][:10] for each in merged["results"]] == ["2026-01-01", "2026-01-02"]
    assert (merged["command"], [each["command"] for each in merged["earlier"]]) == ("second", ["first"])
    table = format_table(merged, plot="held-out.png")
    assert "| 32 | 1 | nonoverlapping | 900 | 2.0000 | 7.39 | 4.852e+08 | 0.7213 | 2026-01-01T00:00:00Z |" in table
    third = merge_reports(merged, report_of(result(32), date="2026-01-03T00:00:00Z", command="third"))
    assert third is not None
    assert [each["command"] for each in third["earlier"]] == ["second"], "nothing is left of the first"
    for key in ("precision", "attention", "weights_sha256", "text_sha256"):
        assert merge_reports({**first, key: "other"}, second) is None
        assert merge_reports({name: value for name, value in first.items() if name != key}, second) is None


class Interrupted(UniformModel):
    """A model that fails in its second measurement."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        if tokens.shape[1] > 33:
            raise self.error
        return super().losses(tokens, last=last)


def test_an_interruption_keeps_what_is_finished(
    run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run_dir / "evaluation" / "step_0000007" / "held-out.json"
    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: Interrupted(KeyboardInterrupt()))
    answer = trainshort("evaluate", str(run_dir), "--lengths", "64,32")
    assert (answer.code, answer.out, kept.exists()) == (130, "", False)
    assert "to go on from where it was, give the same command again\n" in answer.error
    answer = trainshort("evaluate", str(run_dir), "--lengths", "32,64")
    assert (answer.code, answer.out) == (130, "")
    assert f"stopped after 1 of 2 measurements, which are kept: {kept.with_suffix('.md')}\n" in answer.error
    assert measured(kept) == [("nonoverlapping", 32, 32)]
    assert json.loads(kept.read_text())["command"] == f"trainshort evaluate {run_dir} --lengths 32,64"
    kept.unlink()
    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: Interrupted(TrainshortError("diverged")))
    answer = trainshort("evaluate", str(run_dir), "--lengths", "32,64")
    assert (answer.code, answer.error.splitlines()[-1]) == (1, "error: diverged")
    assert measured(kept) == [("nonoverlapping", 32, 32)]
    answer = trainshort("evaluate", str(run_dir), "--lengths", "64,128")
    assert (answer.code, answer.error) == (1, "error: diverged\n")


class Counting(UniformModel):
    """A model that counts the windows that it sees, and is stopped after some."""

    batch_tokens = 128

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.seen, self.stop_after = 0, stop_after

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(tokens)
        length = tokens.shape[1] - 1
        of_order = (tokens[:, :-1] * torch.arange(length)).cumsum(1) % 11 / 10
        return super().losses(tokens, last=last) + of_order[:, length - (last or length) :]


def test_an_interrupted_evaluation_goes_on(
    run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch, run_values: dict[str, Any]
) -> None:
    command = ("evaluate", str(run_dir), "--lengths", "32,64", "--protocol", "sliding:8", "--context")
    folder = run_dir / "evaluation" / "step_0000007"

    text = replace(text_of(1000), tokens=np.random.default_rng(0).integers(32, size=1000, dtype=np.int64))
    monkeypatch.setattr("training.evaluation.run.held_out_text", lambda _: text)

    def evaluated_by(model: Counting) -> tuple[int, str]:
        monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: model)
        answer = trainshort(*command)
        return answer.code, answer.error

    whole = Counting()
    assert evaluated_by(whole)[0] == 0
    expected = json.loads((folder / "held-out.json").read_text())
    assert not [*folder.glob("partial*")], "nothing is left of what is done"
    seen = 0
    # in the first measurement, in the second, and twice in the points of the context
    shares: list[float] = []
    for stop in (9, 160, 3000, None):
        # the last one among windows whose tokens are shuffled
        model = Counting(stop_after=whole.seen - seen - 700 if stop is None else stop)
        code, error = evaluated_by(model)
        assert code == 130
        assert "to go on from where it was, give the same command again\n" in error
        shares += map(
            float, re.findall(r"^going on with an interrupted evaluation: (\S+)% of the work is done$", error, re.M)
        )
        seen += model.seen
    assert len(shares) == 3, "the first has nothing to go on with"
    assert 0 < shares[0] < shares[1] < shares[2] < 100
    last = Counting()
    code, error = evaluated_by(last)
    assert (code, seen + last.seen) == (0, whole.seen), "no window is scored twice"
    report = json.loads((folder / "held-out.json").read_text())
    for changing in ("date", "command", "earlier"):
        for each in (
            report,
            expected,
            report["context"],
            expected["context"],
            *report["results"],
            *expected["results"],
        ):
            each.pop(changing, None)
    assert report == expected
    assert not [*folder.glob("partial*")]


def test_other_weights_or_texts_begin_anew(
    run_dir: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch, run_values: dict[str, Any]
) -> None:
    folder, words = run_dir / "evaluation" / "step_0000007", "going on with an interrupted evaluation"

    def evaluated_by(model: Counting, *lengths: str) -> tuple[int, str]:
        monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: model)
        answer = trainshort("evaluate", str(run_dir), "--lengths", *lengths)
        return answer.code, answer.error

    assert evaluated_by(Counting(stop_after=9), "32")[0] == 130
    assert words not in evaluated_by(Counting(stop_after=0), "64")[1], "another length"
    opened = opened_checkpoint(run_dir / "checkpoints" / "step_0000007", run_values, step=7, sha256="2")
    monkeypatch.setattr("training.evaluation.run.open_checkpoint", lambda _: opened)
    assert words not in evaluated_by(Counting(), "32")[1], "other weights"
    opened = opened_checkpoint(run_dir / "checkpoints" / "step_0000007", run_values, step=7)
    for kept, version in ((100, b"-"), (0, b"-"), (None, b"\xff")):  # cut, empty, a version of ZIP that is none
        assert evaluated_by(Counting(stop_after=9), "32")[0] == 130
        for file in folder.glob("partial*.npz"):
            assert file.stat().st_size < 5000
            file.write_bytes(file.read_bytes()[:kept].replace(b"PK\x01\x02-\x03-", b"PK\x01\x02-\x03" + version))
        model = Counting()
        code, error = evaluated_by(model, "32")
        assert (code, model.seen, "cannot be read" in error) == (0, 31, True)
        assert "its measurement starts again\n" in error


def test_a_long_evaluation_is_written_on_the_way(
    run_dir: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run_dir / "evaluation" / "step_0000007" / "held-out.json"
    seen: list[list[int]] = []
    hour = iter(range(0, 360_000, 3600))

    class Slow(UniformModel):
        def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
            seen.append([length for *_, length in measured(kept)] if kept.exists() else [])
            return super().losses(tokens, last=last)

    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, **__: Slow())
    monkeypatch.setattr("time.monotonic", lambda: float(next(hour)))
    evaluate(999, 998, 997)
    assert seen == [[], [999], [998, 999]]


def test_a_log_shows_progress_within_a_measurement(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with EvaluationProgress(inputs=1000, measurements=2) as progress:
        progress.begin("sliding:1 at 512")
        for _ in range(100):  # a second each
            now[0] += 1
            progress.advance(5)
        progress.finish("loss 2.0000, perplexity 7.39")
        progress.begin("sliding:1 at 1,024")
        now[0] += 1000
        progress.advance(100)
        for _ in range(60):
            now[0] += 1
            progress.advance(1)
    lines = caplog.messages
    assert lines[0] == "1/2  sliding:1 at 512: 5.0% of the evaluation, about 3m10s left"
    assert len(lines[:9]) == 9
    assert all(line.startswith("1/2  sliding:1 at 512: ") for line in lines[:9])
    # a line every ten seconds of the hundred; the last one is the result
    assert lines.index("1/2  sliding:1 at 512: loss 2.0000, perplexity 7.39, 1m40s") in (9, 10)
    later = [line for line in lines if line.startswith("2/2")]
    assert later[0] == "2/2  sliding:1 at 1,024: 60.0% of the evaluation, about 12m13s left"
    assert len(later) == 3, "every thirty seconds once it has taken ten minutes"
    assert math.isclose(float(later[-1].split()[4].rstrip("%")), 66.0)
