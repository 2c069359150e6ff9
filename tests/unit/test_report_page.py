"""`trainshort report`: what the page shows of one run and of several, and what it never overwrites."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Call, refused
from tests.support.compared_runs import add_report, make_run
from training.page.axis import fit_axis, lengths_axis, linear_ticks, write_value
from training.page.chart import MOST_POINTS, thin
from training.page.starts import read_starts

VOID = {"meta", "link", "br", "path", "circle", "line"}
SECTIONS = ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Perplexity by length", "Certificate",
            "Attention bias per head", "Layout", "Starts and saves", "Environment", "Cost")  # fmt: skip


class ReadPage(HTMLParser):
    """Reads a page; fails at an end tag that closes another element than the last one opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["h2"], ["h3"]):
            self.headings.append(data.strip())
        if self.open[-1:] not in (["style"], ["script"]):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def curves(self, title: str) -> list[str | None]:
        """Return the labels of the curves of a chart."""
        labels: list[str | None] = []
        inside = False
        for tag, attributes in self.tags:
            if tag == "svg" and attributes.get("class") == "chart":
                inside = (attributes["aria-label"] or "").startswith(f"{title}:")
            elif tag == "g" and inside:
                labels.append(attributes["data-label"])
        return labels


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def certificate(*, step: int, minute: int, ranks: int = 2, **changes: Any) -> dict[str, Any]:
    stated = [
        {"rank": rank, "tensor_rank": 0, "stage": 0, "data_rank": rank, "position": "alibi", "backend": "sdpa",
         "precision": "fp32", "device": "cpu", "heads": [0, 1, 2, 3], "slopes_sha256": "a", "recency": 0.1,
         "error": 2e-7}
        for rank in range(ranks)
    ]  # fmt: skip
    started_at = f"2026-01-02T03:{minute:02}:00+00:00"
    return {"started_at": started_at, "step": step, "position": "alibi", "heads": 4, "ranks": stated, **changes}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def whole_run(folder: Path) -> Path:
    """Return a run of ten steps whose first start lost steps 6 and 7 and whose second had a save that failed."""
    run_dir = make_run(folder)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "learning_rate": 1e-3, "grad_norm": 0.5} for line in lines]
    for line in lines[1:]:  # the first is of a driver that does not tell
        line["energy_joules"] = 3.6e5
    lines[8] |= {"save_seconds": 3.0, "failed_saves": 1}
    lines[9] |= {"failed_saves": 1}
    write_lines(run_dir / "metrics.jsonl", lines)
    write_lines(run_dir / "logs" / "metrics_discarded.jsonl", [{**lines[5], "save_seconds": 1.0}, lines[6]])
    write_lines(run_dir / "certificates.jsonl", [certificate(step=0, minute=4), certificate(step=5, minute=9)])
    environment = {
        "python": "3.11.7",
        "device": "a card",
        "world_size": 2,
        "packages": {"torch": "2.13.0", "gguf": None},
        "slurm": {"job_id": "77", "nodes": "n[1-2]"},
        "code": {"commit": "a" * 40, "diff": "+"},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    add_report(run_dir, {32: 21.25, 64: 20.5, 128: 20.25})
    return run_dir


def written(trainshort: Call, *arguments: str, page: str) -> ReadPage:
    answer = trainshort("report", *arguments)
    assert (answer.code, answer.out, answer.error) == (0, "", f"page: {page}\n")
    return ReadPage(Path(page))


def test_a_page_has_every_part_and_needs_no_network(trainshort: Call) -> None:
    whole_run(Path("run"))
    page = written(trainshort, "run", page="run/report.html")
    assert not {*SECTIONS} - {*page.headings}
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", page.source)
    assert not [tag for tag, attributes in page.tags if {"src", "href"} & {*attributes} and tag != "link"]
    assert page.curves("Loss") == ["each step", "mean of 2% of the steps", "validation"]
    assert page.curves("Perplexity by length") == ["nonoverlapping"]
    assert page.curves("Attention bias per head") == [f"head {head}" for head in range(4)]
    assert "training length 32" in page.text
    assert "ALiBi verified on 2 ranks; largest error 2e-07, allowed 1e-05" in page.text
    assert "data rank 1 ZeRO-1: part 2 of 2 of optimizer state" in page.text
    assert "rank 1 heads 0 to 3 embedding, layers 0 to 3, head" in page.text
    for fact in ("device a card", "SLURM job 77", "nodes n[1-2]", "torch 2.13.0", f"{'a' * 12}, with changes"):
        assert fact in page.text
    assert "gguf" not in page.text, "it was not installed"


def test_starts_and_failed_saves_are_on_the_time_line(trainshort: Call) -> None:
    page = written(trainshort, str(whole_run(Path("run"))), page="run/report.html")
    titles = [attributes["title"] for _, attributes in page.tags if "title" in attributes]
    assert titles == [
        *("start 1: steps 1 to 7, the last 2 steps lost",) * 2,
        "start 2: steps 6 to 10",
        *("saved after step 5", "saved after step 10", "a save failed after step 8"),
    ]
    # 5 steps of 6 s, a validation of 2 s, 2 lost steps, a save of 1 s; the second start began 5 minutes after the first
    assert "1 2026-01-02 03:04 UTC - 2 1 to 7 45 s 2 -" in page.text
    assert "2 2026-01-02 03:09 UTC 4m15s 2 6 to 10 35 s - 1" in page.text
    # 80 s on two ranks
    assert (
        "time of training 80 s device hours 0.0444 on a card energy 1.1 kWh by the GPUs' own counters in" in page.text
    )
    assert "11 of 12 steps lost 13 s: 2 steps trained again" in page.text


def test_runs_are_laid_over_each_other(trainshort: Call) -> None:
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        add_report(make_run(Path(name), train={"learning_rate": rate}), {32: 20.0, 64: 19.0})
    page = written(trainshort, "a", "b", page="comparison.html")
    assert page.curves("Loss") == ["a, each step", "b, each step", "a", "a, validation", "b", "b, validation"]
    assert page.curves("Perplexity by length") == ["a", "b"]
    assert "train.learning_rate 0.001 0.002" in page.text
    assert [attributes["data-shows"] for tag, attributes in page.tags if tag == "button"] == ["0", "1"]
    assert page.curves("Learning rate") == [], "no run has it"


def test_a_new_run_says_what_is_missing_and_what_makes_it(trainshort: Call) -> None:
    run_dir = make_run(Path("a run"), steps=0, checkpoints=(), run={"name": "new"})
    page = written(trainshort, "a run", page="a run/report.html")
    assert "No step yet: trainshort train 'a run/config.yaml'" in page.text
    assert "new has no checkpoint to evaluate: first trainshort train" in page.text
    assert page.text.count("Written when training starts:") == 2
    for damaged in ("certificates.jsonl", "environment.json"):
        (run_dir / damaged).write_text('{"step": 1, "ranks": [{}]}\n{"torn')
    assert "Not started yet" in written(trainshort, "a run", page="a run/report.html").text


def test_names_from_files_are_escaped_and_secrets_hidden(trainshort: Call) -> None:
    for folder in ("<script>x", "b&b/<script>x"):
        add_report(make_run(Path(folder), run={"name": "same"}), {32: 20.0}, text="<i>.txt")
    environment = {"device": "<b>", "packages": {"torch": "2"}, "code": {"repository": "https://me:pw@host/x"}}
    Path("<script>x/environment.json").write_text(json.dumps(environment))
    page = written(trainshort, "<script>x", "b&b/<script>x", page="comparison.html")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<i>" not in page.source
    assert "<b>" not in page.source.split("<main>")[1].replace("<b>data rank", "")
    assert "pw" not in page.text
    assert "https://host/x" in page.text


def test_a_curve_keeps_its_ends_and_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert {points[0], points[54_321], points[77_777], points[-1]} <= {*kept}
    assert kept == sorted(kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_axes_have_round_ticks_that_read_well() -> None:
    assert linear_ticks(0.0, 1.06) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert fit_axis([1.0, 3.0], unit="count", pad=False).ticks == (1.0, 2.0, 3.0), "there is no half of a step"
    axis = fit_axis([0.5, 80.0], may_be_logarithmic=True)
    assert (axis.logarithmic, axis.ticks) == (True, (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0))
    assert [axis.place(value) for value in (axis.low, axis.high, 0.0)] == [0.0, 1.0, -1.0]
    assert lengths_axis([128, 300, 512, 16_384], keep=[256]).ticks == (128, 256, 512, 16_384)
    written = [write_value(value, unit="plain") for value in (0.0, 0.25, 2e-4, 1.5e-4, 12_000.0, 3.2e6)]
    assert written == ["0", "0.25", "2e-4", "1.5e-4", "12,000", "3.2e6"]
    assert [write_value(value, unit="count") for value in (16_384, 2e10)] == ["16,384", "20B"]


def test_a_large_layout_shows_its_first_copies(trainshort: Call) -> None:
    train = {"micro_batch": 1, "global_batch": 80}
    run_dir = make_run(Path("run"), train=train)
    write_lines(run_dir / "certificates.jsonl", [certificate(step=0, minute=4, ranks=80)])
    page = written(trainshort, "run", page="run/report.html")
    assert "80 ranks: tensor 1 x pipeline 1 x data 80, ZeRO-1" in page.text
    assert "data rank 63 " in page.text
    assert "data rank 64 " not in page.text
    assert "and 16 more data ranks" in page.text


def test_a_refused_start_shows_its_wrong_rank(trainshort: Call) -> None:
    run_dir = make_run(Path("run"), steps=0, checkpoints=())
    line = certificate(step=0, minute=4, refused="positions are wrong: rank 1")
    line["ranks"][1]["error"] = None  # JSON has no nan
    write_lines(run_dir / "certificates.jsonl", [line])
    page = written(trainshort, "run", page="run/report.html")
    assert "refused: positions are wrong: rank 1" in page.text
    assert "1 0 / 0 / 1 0 to 3 not a number wrong sdpa, fp32, cpu 0 0 / 0 / 0 0 to 3 2e-07 right" in page.text
    assert "verified" not in page.text


def test_lost_steps_belong_to_the_start_that_took_them(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1.0, "step_seconds": 1.0} for step in range(1, 21)]
    # the second start lost 9 to 12 too, the third found its newest checkpoint broken
    groups = [steps[4:10], steps[8:12], steps[2:6]]
    write_lines(tmp_path / "logs" / "metrics_discarded.jsonl", [line for group in groups for line in group])
    starts = [certificate(step=step, minute=step) for step in (0, 4, 8)]
    starts += [certificate(step=2, minute=30), certificate(step=8, minute=40, refused="why")]
    write_lines(tmp_path / "certificates.jsonl", starts)
    read = read_starts(tmp_path, steps)
    assert [[each["step"] for each in start.steps] for start in read] == [[1, 2], [], [], [*range(3, 21)], []]
    assert [[each["step"] for each in start.lost] for start in read] == [
        [3, 4, *range(5, 11)],
        [5, 6, *range(9, 13)],
        [],
        [],
        [],
    ]


def test_a_file_that_is_no_page_is_never_overwritten(trainshort: Call) -> None:
    make_run(Path("run"))
    Path("mine.html").write_text("<html>mine</html>")
    assert refused(trainshort, "report", "run", "--out", "mine.html") == (
        "--out mine.html is not a page of this command: move it away, or give another path"
    )
    assert Path("mine.html").read_text() == "<html>mine</html>"
    Path("folder.html").mkdir()
    assert "folder.html is a folder" in refused(trainshort, "report", "run", "--out", "folder.html")
    assert refused(trainshort, "report", "run", "--out", "page.txt").endswith("the page is HTML, write --out page.html")
    for _ in range(2):  # its own page is replaced
        written(trainshort, "run", "--out", "page.html", page="page.html")
    answer = trainshort("report", "run", "--out", "none/page.html")
    assert (answer.code, answer.error[:36]) == (3, "error: page none/page.html cannot be")
    assert {path.name for path in Path().iterdir()} == {"run", "mine.html", "folder.html", "page.html"}
