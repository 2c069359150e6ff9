"""The page of a run that trained on four ranks, in Chromium, against the files that it was made from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Reader
from tests.support.data import write_book
from tests.support.processes import metrics, trainshort
from tests.support.small_run import WHOLE_JOB, overrides_of, set_options

pytestmark = pytest.mark.browser
STEPS: int = WHOLE_JOB["train"]["steps"]
LENGTH: int = WHOLE_JOB["data"]["sequence_length"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo on tensor 2 x pipeline 2, stopped and started again after the first steps, and evaluated."""
    folder = tmp_path_factory.mktemp("real")
    write_book(folder)
    options = set_options(overrides_of({**WHOLE_JOB, "run": {"name": "real", "dir": "run"}}))
    more = ["--set", "train.micro_batch=4", "--set", "train.decay_steps=12"]
    for arguments in (
        ["prepare", "demo", *options, *more],
        ["train", "demo", *options, *more, "--set", "train.steps=8"],
        ["train", "demo", *options, *more],
        ["evaluate", "run", "--lengths", f"{LENGTH},{4 * LENGTH}"],
    ):
        process = trainshort(folder, *arguments)
        assert process.returncode == 0, process.stderr[-3000:]
    return folder / "run"


@pytest.fixture
def shown(reader: Reader, run_dir: Path) -> Callable[[str, float], dict[str, str]]:
    """Reads the values at a share of a chart's x axis: the x value as "", and each curve's by its label."""
    page = reader.write(str(run_dir))
    reader.look_at(page, name="real")

    def values_at(title: str, share: float) -> dict[str, str]:
        reader.browser.move_to(*reader.browser.run("return placeIn(...arguments)", title, share))
        head, *lines = reader.browser.run("return tipOf(arguments[0])", title).split("\n")
        return {"": head, **dict(line.rsplit(": ", 1) for line in lines)}

    return values_at


def test_charts_show_what_the_files_hold(
    reader: Reader, run_dir: Path, shown: Callable[[str, float], dict[str, str]]
) -> None:
    steps = metrics(run_dir)
    assert [line["step"] for line in steps] == [*range(1, STEPS + 1)]
    fields = {"Learning rate": "learning_rate", "Gradient norm": "grad_norm", "Throughput": "tokens_per_second"}
    for place in (0, 5, STEPS - 1):
        share = place / (STEPS - 1)
        line = steps[place]
        for title, field in (("Loss", "loss"), *fields.items(), ("Memory", "memory_gb")):
            at = shown(title, min(max(share, 0.001), 0.999))
            value = next(text for label, text in at.items() if label and label != "validation")
            assert at[""] == str(line["step"])
            assert number(value) == pytest.approx(line[field], rel=0.02), title
    validated = {line["step"]: line["validation_loss"] for line in steps if "validation_loss" in line}
    assert number(shown("Loss", (5 - 1) / (STEPS - 1))["validation"]) == pytest.approx(validated[5], rel=5e-3)
    report = json.loads((run_dir / "evaluation" / "report.json").read_text())
    for result in report["results"]:
        place = (math.log2(result["length"] / LENGTH) + 0.3) / 2.6  # the axis goes 0.3 octaves beyond its ends
        at = shown("Perplexity by length", place)
        assert at[""] == f"{result['length']:,}"
        assert number(at["nonoverlapping"]) == pytest.approx(result["perplexity"], rel=2e-3)
    slopes = [2.0 ** (-2 * head) for head in range(1, 5)]
    at = shown("Attention bias per head", 0.5)
    for label, bias in at.items():
        if label:
            assert number(bias) == pytest.approx(-slopes[int(label.split()[1])] * number(at[""]), rel=0.1, abs=0.1)
    assert reader.browser.messages() == []


def number(text: str) -> float:
    value = text.replace(",", "").split()[0]
    unit = {"k": 1e3, "M": 1e6}.get(value[-1], 1.0)
    return float(value.rstrip("kM")) * unit


def test_layout_starts_and_cost_are_those_of_the_files(reader: Reader, run_dir: Path) -> None:
    reader.browser.show_as(width=1400)
    reader.browser.open(reader.write(str(run_dir)))

    def texts(selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
        return [" ".join(text.split()) for text in reader.browser.run(script, selector)]

    lines = [json.loads(line) for line in (run_dir / "certificates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 8]
    held = {rank["rank"]: ", ".join(map(str, rank["heads"])) for rank in lines[-1]["ranks"]}
    assert [text.partition(" embedding")[0].partition(" layer")[0] for text in texts(".stage .rank")] == [
        f"rank {rank} heads {held[rank]}" for rank in (0, 1, 2, 3)
    ]
    assert texts(".stage > .facts") == ["stage 0", "stage 1"]
    largest = max(rank["error"] for rank in lines[-1]["ranks"])
    assert texts("header .verdict") == [f"ALiBi verified on 4 ranks; largest error {largest:.2g}, allowed 1e-05"]
    times = ("step_seconds", "validation_seconds", "save_seconds")
    seconds = sum(line.get(time) or 0.0 for line in metrics(run_dir) for time in times)
    assert f"device hours {4 * seconds / 3600:.3g} on cpu" in " ".join(texts(".card"))
    bars: list[dict[str, Any]] = reader.browser.run(
        "return [...document.querySelectorAll('.time .bar')].map((each) => ({title: each.title, "
        "width: each.getBoundingClientRect().width}))"
    )
    assert [bar["title"] for bar in bars] == ["start 1: steps 1 to 8", f"start 2: steps 9 to {STEPS}"]
    assert all(bar["width"] > 20 for bar in bars)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert f"platform {environment['platform']}" in " ".join(texts(".pairs"))
