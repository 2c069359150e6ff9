"""The table and the figure of a study: figures of rows, means and ranges over seeds, what does not compare."""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from configs.study import load_study
from launch.show.study import show_plan
from tests.support.studies import write_study
from training.evaluation.chart import save_figure
from training.study.plot import draw_study
from training.study.progress import RunProgress
from training.study.rows import StudyRow, read_study_rows, write_row
from training.study.table import StudyTable, build_table, format_study, perplexity_cells, write_table

pytestmark = pytest.mark.usefixtures("folder")

ALIBI = {1: {32: 20.0, 64: 18.0, 128: 17.0}, 2: {32: 24.0, 64: 19.0}}
ROTARY = {1: {64: 30.0, 128: 2_000_000.0}}
FIGURES = {
    **{"parameters": 44_832, "tokens": 819_200, "seconds": 125.0, "tokens_per_second": 6960.0, "memory_gb": 0.45},
    **{"loss": 3.85481, "validation_loss": None, "steps": 10},
}


def row(run: str, seed: int, perplexities: dict[int, float], *, train_length: int, **changes: Any) -> StudyRow:
    results = [
        {"text": text, "text_sha256": text, "protocol": "nonoverlapping", "length": length, "perplexity": value}
        for text, values in (("held-out", perplexities), ("book.txt", {32: 50.0}))
        for length, value in values.items()
    ]
    values: dict[str, Any] = {
        **{
            "study": "small",
            "run": run,
            "seed": seed,
            "config_sha256": "",
            "config": {},
            "code": {},
            "device": "a CPU",
        },
        **{"data": {"tokenizer_sha256": "one"}, "finished_at": "", "results": results},
        "figures": {**FIGURES, "train_length": train_length},
    }
    return StudyRow(**{**values, **changes})


@pytest.fixture
def rows() -> dict[tuple[str, int], StudyRow]:
    rows = [row("alibi", seed, values, train_length=32) for seed, values in ALIBI.items()]
    rows += [row("rotary", seed, values, train_length=64) for seed, values in ROTARY.items()]
    return {(each.run, each.seed): each for each in (*reversed(rows), row("gone", 1, {32: 1.0}, train_length=32))}


@pytest.fixture
def table(rows: dict[tuple[str, int], StudyRow]) -> StudyTable:
    loaded = load_study(write_study(texts=["held-out", "book.txt"]), overrides=["checkpoint.every=3", "train.clip=2"])
    return build_table(loaded, rows)


def cells_of(markdown: str, heading: str) -> Iterator[list[str]]:
    part = markdown.split(f"## {heading}\n\n")[1].split("\n\n")[0]
    for line in part.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_stand_in_the_order_of_the_study(table: StudyTable) -> None:
    markdown = format_study(table)
    figures = ["44.8k", "819k", "2m05s", "6.96k", "450 MB", "3.8548"]
    assert list(cells_of(markdown, "Runs")) == [
        ["alibi", "1", "-", *figures],
        ["alibi", "2", "-", *figures],
        ["rotary", "1", 'model.position: "rotary"', *figures],
    ]
    assert list(cells_of(markdown, "Perplexity per token on held-out, nonoverlapping")) == [
        ["alibi", "1", "20.00", "18.00", "17.00"],
        ["alibi", "2", "24.00", "19.00", "-"],
        ["alibi", "mean of 2", "22.00", "18.50", "-"],
        ["alibi", "spread", "4.00", "1.00", "-"],
        ["rotary", "1", "-", "30.00", "2e+06"],
    ]
    assert "![Perplexity against length](study.png)" in markdown
    assert "`spread`: from the lowest to the highest seed." in markdown, "as the rows are called"
    # what the command line sets counts
    assert (
        "in all runs `parallel.tensor: 1`, `parallel.pipeline: 1`, `checkpoint.every: 3`, `train.clip: 2.0`\n"
        in markdown
    )


def test_a_trunk_of_the_study_is_called_by_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    point = "study/trunk-seed1/checkpoints/step_0001000"
    froms = {"a": f"./{point}", "b": "study/trunk-seed1", "c": point.replace("study/", "other/")}
    own = {name: {"set": {"train.branch_from": path, "train.steps": 1500}} for name, path in froms.items()}
    loaded = load_study(write_study(runs={"trunk": None, **own}))
    table = build_table(loaded, {(name, 1): row(name, 1, ALIBI[1], train_length=32) for name in own})
    named = ["trunk-seed1 at step 1,000", "trunk-seed1", froms["c"]]
    assert [cells[2] for cells in cells_of(format_study(table), "Runs")] == [
        f'train.branch_from: "{name}", train.steps: 1500' for name in named
    ]
    differing = [run["differing"]["train.branch_from"] for run in table.to_json()["runs"]]
    assert differing == [*froms.values()], "JSON is for programs"
    show_plan(loaded, [RunProgress(planned, "train", 0, 0, (), None, None) for planned in loaded.runs], unprepared=[])
    plan = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    shown = [cells[1] for cells in plan if cells[0] in ("a-seed1", "b-seed1", "c-seed1")]
    assert shown == [f"train.branch_from: {name}, train.steps: 1500" for name in named]


def test_the_json_has_each_seed_and_their_means(table: StudyTable) -> None:
    as_json, markdown = write_table(table)
    document = json.loads(as_json.read_text())
    assert markdown.read_text() == format_study(table)
    assert (document["set"]["checkpoint.every"], document["set"]["train.clip"]) == (3, 2.0)
    assert [(run["run"], run["seed"], run["seconds"]) for run in document["runs"]] == [
        ("alibi", 1, 125.0),
        ("alibi", 2, 125.0),
        ("rotary", 1, 125.0),
    ]
    ours = [each for each in document["over_seeds"] if each["text"] == "held-out" and each["run"] == "alibi"]
    assert [(each["length"], each["mean"], each["lowest"], each["highest"]) for each in ours] == [
        (32, 22.0, 20.0, 24.0),
        (64, 18.5, 18.0, 19.0),
    ]
    assert document["unfinished"] == document["notes"] == []


def test_the_error_of_a_perplexity_is_that_of_its_loss(rows: dict[tuple[str, int], StudyRow]) -> None:
    results = rows["rotary", 1].results
    results[0]["standard_error"] = 0.01
    table = build_table(load_study(write_study()), rows)
    assert perplexity_cells(table, table.texts[0])[-1][3] == "30.00 ± 0.30"
    # what the table leaves out of the exponential's growth is far below its digits
    assert (30.0 * math.exp(0.01) - 30.0 * math.exp(-0.01)) / 2 == pytest.approx(0.3, abs=5e-5)


def test_what_does_not_compare_is_said(rows: dict[tuple[str, int], StudyRow]) -> None:
    del rows["alibi", 2]
    rows["rotary", 1] = row("rotary", 1, ROTARY[1], train_length=64, device="a GPU", data={"tokenizer_sha256": "two"})
    rows["rotary", 1].results[-1]["text_sha256"] = "another book"
    table = build_table(load_study(write_study()), rows)
    assert list(table.notes()) == [
        "not finished: alibi-seed2",
        "the texts called book.txt differ: perplexities on them do not compare",
        "the tokenizers differ: perplexities and losses are per token and do not compare",
        "the runs are of different devices: see the rows",
    ]
    assert "- not finished: alibi-seed2\n" in format_study(table)
    rows["rotary", 1] = row("rotary", 1, ROTARY[1], train_length=32)
    assert len(list(build_table(load_study(write_study()), rows).notes())) == 1
    for result, tokens in ((rows["rotary", 1].results[0], 100), (rows["alibi", 1].results[1], 96)):
        result["tokens"] = tokens
    (note,) = list(build_table(load_study(write_study()), rows).notes())[1:]
    assert note.startswith("nonoverlapping at 64 on held-out: the runs scored different tokens, which alone moves")
    for result, documents in ((rows["rotary", 1].results[0], "33" * 32), (rows["alibi", 1].results[0], None)):
        result["documents_sha256"] = documents
    assert list(build_table(load_study(write_study()), rows).notes())[1:] == [
        "documents of held-out are masked in some runs: perplexities there do not compare with others"
    ]


def test_the_figure_has_a_line_a_run_and_a_band_of_seeds(table: StudyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def save(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return save_figure(figure, path)

    monkeypatch.setattr("training.study.plot.save_figure", save)
    path = draw_study(table)
    assert path is not None
    assert matplotlib.image.imread(path).std() > 0.01
    held_out, book = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in held_out.get_lines()}
    assert lines["alibi"] == [[32, 22.0], [64, 18.5]]
    assert lines["rotary"] == [[64, 30.0], [128, 2_000_000.0]]
    bands = [np.unique(band.get_paths()[0].vertices[:, 1]).tolist() for band in held_out.collections]
    assert bands[0] == [18.0, 19.0, 20.0, 24.0]
    marked = {line.get_xdata()[0] for line in held_out.get_lines() if line.get_linestyle() == "--"}
    assert marked == {32, 64}, "both training lengths"
    colours = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (held_out, book)]
    assert colours[0]["rotary"] == colours[1]["rotary"] != colours[0]["alibi"]


def test_a_text_that_one_seed_was_measured_on_is_not_drawn(
    rows: dict[tuple[str, int], StudyRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []

    def save(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr("training.study.plot.save_figure", save)
    by_hand = {**rows["alibi", 1].results[0], "protocol": "last:8"}
    rows["alibi", 1].results.insert(0, by_hand)
    del rows["rotary", 1].results[:2]  # its row is of a study that had no held-out text
    table = build_table(load_study(write_study()), rows)
    assert [text.protocol for text in table.texts] == ["last:8", "nonoverlapping", "nonoverlapping"]
    assert draw_study(table) is not None
    assert len(drawn[0].axes) == 2
    assert [name.get_text() for name in drawn[0].legends[0].get_texts()] == ["alibi", "rotary"], "of all panels"
    for row in rows.values():
        row.results[:] = [by_hand] if row is rows["alibi", 1] else []
    table = build_table(load_study(write_study()), rows)
    assert draw_study(table) is None
    assert "study.png" not in format_study(table)


def test_a_study_without_a_row_draws_nothing() -> None:
    table = build_table(load_study(write_study()), {})
    assert draw_study(table) is None
    assert list(table.notes()) == ["not finished: alibi-seed1, alibi-seed2, rotary-seed1"]
    assert "study.png" not in format_study(table)


def test_two_studies_write_to_one_file_at_once() -> None:
    path, seeds = Path("shared.jsonl"), range(1, 21)

    def write_rows(study: str) -> None:
        for seed in seeds:
            write_row(path, row("alibi", seed, {32: 20.0}, train_length=32, study=study))

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(write_rows, ("one", "two"))] == [None, None]
    for study in ("one", "two"):
        assert {*read_study_rows(path, study=study)} == {("alibi", seed) for seed in seeds}
