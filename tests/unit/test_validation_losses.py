"""Validations at further lengths and by source: what is measured, and that all that shows losses shows them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from mlflow.utils.validation import validate_param_and_metric_name

from configs.errors import InputError
from data_pipeline.order import held_out_ids, parts_of
from data_pipeline.samples import open_samples
from launch.watch import RunWatcher
from tests.support.command_line import Call
from tests.support.compared_runs import make_run
from tests.support.data import BOOK
from tests.support.one_rank import one_rank
from training.further_losses import fields_by_length, fields_by_source
from training.tracking.names import name_over_tokens, tracked_name

ASKED = ("evaluate.every=2", "evaluate.samples=4", "evaluate.validation_lengths=[4, 32]", "evaluate.by_source=true")


def test_a_run_measures_lengths_and_sources_on_one_text(tmp_path: Path) -> None:
    for name, text in (("a.txt", BOOK), ("b.txt", BOOK.upper())):
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    sources = f"data.sources=[{{path: {paths[0]}, weight: 1}}, {{path: {paths[1]}, weight: 2}}]"
    with one_rank(tmp_path, sources, "data.split=0.3", "data.vocab_size=400", *ASKED) as rank:
        rank.start(tmp_path / "run", steps=2)
        samples = open_samples(rank.prepared, sequence_length=32, split=0.3, seed=1, held_out=True)
        ids = held_out_ids(samples.sizes, weights=samples.weights, count=4)  # each holds four sequences of 8 tokens
        rows = torch.from_numpy(samples.read(ids))

        def mean_loss(rows: torch.Tensor, *, length: int) -> float:
            return rank.engine.mean_loss([rows[:, n : n + length + 1] for n in range(0, 32, length)])

        expected = {length: mean_loss(rows, length=length) for length in (4, 8, 32)}
        parts = torch.from_numpy(parts_of(ids, samples.sizes))
        by_source = {path: mean_loss(rows[parts == part], length=8) for part, path in enumerate(paths)}
    first, second = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not [field for field in first if field.startswith("validation")]
    assert second["validation_loss"] == pytest.approx(expected[8], rel=1e-5)
    measured = {length: second[field] for length, field in fields_by_length(second).items()}
    assert measured == pytest.approx({length: expected[length] for length in (4, 32)}, rel=1e-5)
    measured = {source: second[field] for source, field in fields_by_source(second).items()}
    assert measured == pytest.approx(by_source, rel=1e-5)


def test_what_mlflow_refuses_is_no_part_of_a_name() -> None:
    assert tracked_name("validation_loss_at_2048") == "validation/loss_at_2048"
    assert tracked_name("validation_loss_of_a.txt") == "validation/loss_of_a.txt"
    assert name_over_tokens("validation_loss_at_2048") == "by_tokens/validation_loss_at_2048"
    assert [name_over_tokens(field) for field in ("validation_seconds", "loss_scale")] == [None, None]
    names = [
        tracked_name(f"validation_loss_of_{source}") for source in ("a/*.txt", "a_*.txt", "x" * 4000, "y" + "x" * 4000)
    ]
    assert len({*names}) == 4
    assert names[0].startswith("validation/loss_of_a__.txt-")
    assert all(validate_param_and_metric_name(name) and len(name) < 250 for name in names)


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose validations have two further lengths and two sources."""
    monkeypatch.chdir(tmp_path)  # `compare` writes its plot there
    run_dir = make_run(tmp_path / "run")  # its newest start did without
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for step in (steps[4], steps[9]):
        loss = step["validation_loss"]
        step |= {"validation_loss_at_64": loss + 0.25, "validation_loss_at_128": loss + 1.0}
        step |= {"validation_loss_of_a.txt": loss - 0.5, "validation_loss_of_b.txt": loss + 0.5}
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return run_dir


def test_a_source_without_a_sample_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(BOOK, encoding="utf-8")
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    few = ("evaluate.samples=2", f"data.sources=[{{path: {a}, weight: 1}}, {{path: {b}, weight: 30}}]")
    with pytest.raises(InputError, match=f"none of the 2 sequences of a validation is of {a}: raise evaluate.samples"):
        with one_rank(tmp_path, "data.split=0.3", *ASKED, *few):
            pytest.fail("the data was accepted")
    long = ("evaluate.validation_lengths=[2048]", few[1].replace("30", "300"))
    advice = r"gets none of the \d+ held-out samples of 2048 tokens: raise its weight, raise data.split or lower evalu"
    with pytest.raises(InputError, match=advice), one_rank(tmp_path, "data.split=0.3", *ASKED, *few, *long):
        pytest.fail("the data was accepted")


def test_commands_show_each_length_and_source(validated: Path, trainshort: Call) -> None:
    view = RunWatcher(validated).look()
    assert view.by_length == pytest.approx({64: 3.85, 128: 4.6})
    assert view.by_source == pytest.approx({"a.txt": 3.1, "b.txt": 4.1})
    out = trainshort("watch", str(validated)).out
    for line in ("  at 64        3.8500  +0.2500 by the length alone", "  of source    3.1000  a.txt"):
        assert line in out.splitlines()
    assert json.loads(trainshort("watch", str(validated), "--json").out)["validation_by_length"]["128"] == 4.6
    rows = [line.split() for line in trainshort("compare", str(validated)).out.splitlines()]
    assert ["at", "64", "tokens", "3.8500"] in rows
    assert ["of", "b.txt", "4.1000"] in rows
    steps = (validated / "metrics.jsonl").read_text().splitlines()
    last = {field: value for field, value in json.loads(steps[-1]).items() if field != "validation_loss_at_64"}
    (validated / "metrics.jsonl").write_text("\n".join([*steps[:-1], json.dumps(last), ""]))
    shown = trainshort("compare", str(validated)).out
    assert "at 128 tokens" in shown
    assert "at 64 tokens" not in shown, "the last validation did not measure it"
    (validated / "metrics.jsonl").write_text("\n".join([*steps, ""]))
    trainshort("report", str(validated))
    page = (validated / "report.html").read_text()
    for chart in ("Extrapolation during training: 64 tokens, 128 tokens", "Validation by source: a.txt, b.txt"):
        assert f'aria-label="{chart}"' in page
    shutil.copytree(validated, validated.with_name("second"))
    trainshort("report", str(validated), "second", "--out", "both.html")
    assert "on one text; solid: 64 tokens, dashed: 128 tokens" in Path("both.html").read_text()
    drawn = re.findall(
        r'data-run="(\d)"[^>]*data-label="(?:run|second)[^"]*, (64|128) tokens"', Path("both.html").read_text()
    )
    assert drawn == [("0", "64"), ("0", "128"), ("1", "64"), ("1", "128")]
