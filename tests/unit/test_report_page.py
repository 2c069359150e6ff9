"""`trainshort report`: what the page shows of one run and of several, and what it never overwrites."""

import contextlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Call, refused
from tests.support.compared_runs import add_report, make_run
from tests.support.measured_runs import add_harness, add_retrieval
from tests.support.started_runs import certificate, whole_run, write_lines

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
    assert page.curves("Loss") == ["each step", "validation"], "the mean of so few steps is each step"
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
        *("start 1: steps 1 to 7, 2 steps taken again",) * 2,
        "start 2: steps 6 to 10",
        *("a save ended after step 5", "a save ended after step 10", "a save failed after step 8"),
    ]
    # 5 steps of 6 s, a validation of 2 s, 2 lost steps, a save of 1 s; the second start began 5 minutes after the first
    assert "1 2026-01-02 03:04 UTC - 2 1 to 7 45 s 2 -" in page.text
    assert "2 2026-01-02 03:09 UTC 4m15s 2 6 to 10 35 s - 1" in page.text
    # 80 s on two ranks
    assert (
        "time of training 80 s device hours 0.0444 on a card energy 1.1 kWh by the GPUs' own counters in" in page.text
    )
    assert "11 of 12 steps lost 13 s: 2 steps trained again" in page.text


def test_the_page_of_a_checkpoint_is_not_that_of_its_run(trainshort: Call) -> None:
    make_run(Path("run"), checkpoints=(5, 10))
    page = written(trainshort, "run", page="run/report.html")
    part = written(trainshort, "run/checkpoints/step_0000005/", page="run/report-step_0000005.html")
    assert ReadPage(Path("run/report.html")).source == page.source
    assert "run run · written" in page.text, "its name, and what was given"
    assert "run run/checkpoints/step_0000005 · written" in part.text
    Path("link").symlink_to("run/checkpoints/step_0000010")
    written(trainshort, "link", page="run/report-step_0000010.html")
    with contextlib.chdir("run"):
        written(trainshort, ".", page="report.html")
    written(trainshort, "run", "--out", "new/folder/page.html", page="new/folder/page.html")


def test_a_rollback_is_part_of_the_cost(trainshort: Call) -> None:
    run_dir = whole_run(Path("run"))
    went_back = {"step": 8, "next_sample": 64, "left_out": 16, "from_step": 10, "why": "the loss is nan", "at": "now"}
    (run_dir / "rollbacks.json").write_text(json.dumps({"rollbacks": [went_back]}))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    with (run_dir / "logs" / "metrics_discarded.jsonl").open("a") as file:
        file.write(json.dumps({**lines[8], "rolled_back": 2}) + "\n")
    page = written(trainshort, str(run_dir), page="run/report.html")
    assert "1 2026-01-02 03:04 UTC - 2 1 to 7 45 s 2 -" in page.text, "as without it"
    assert re.search(r"2 2026-01-02 03:09 UTC 4m15s 2 6 to 10 \d+ s 1 1", page.text), "the start that went back"
    assert "s: 3 steps trained again after a restart or a divergence" in page.text
    assert "went back 1 time after a divergence, from step 10 to step 8" in page.text
    (run_dir / "rollbacks.json").write_text("{")
    assert "went back" not in written(trainshort, str(run_dir), page="run/report.html").text


def test_runs_are_laid_over_each_other(trainshort: Call) -> None:
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        add_report(make_run(Path(name), train={"learning_rate": rate}), {32: 20.0, 64: 19.0})
    page = written(trainshort, "a", "b", page="comparison.html")
    assert page.curves("Loss") == ["a", "a, validation", "b", "b, validation"]
    assert page.curves("Perplexity by length") == ["a", "b"]
    assert "train.learning_rate 0.001 0.002" in page.text
    assert "at step 32 1 x 64 2 x a 10 20.00 19.00 b 10 20.00 19.00" in page.text
    assert [attributes["data-shows"] for tag, attributes in page.tags if tag == "button"] == ["0", "1"]
    assert page.curves("Learning rate") == [], "no run has it"
    assert "on held-out, per token; nonoverlapping" in page.text


@pytest.mark.parametrize(("steps", "axis"), [(5, "step"), (6, "training tokens")])
def test_runs_whose_steps_differ_are_drawn_by_tokens(trainshort: Call, steps: int, axis: str) -> None:
    make_run(Path("a"), train={"batch_warmup": [[4, 5]]})
    make_run(Path("b"), train={"batch_warmup": [[8, steps]], "global_batch": 16}, data={"sequence_length": 16})
    assert f">{axis}</text>" in written(trainshort, "a", "b", page="comparison.html").source
    assert ">step</text>" in written(trainshort, "a", page="a/report.html").source, "as its restarts are numbered"


def test_a_long_run_shows_each_step_and_their_mean(trainshort: Call) -> None:
    for name in ("a", "b"):
        make_run(Path(name), steps=200, train={"steps": 200})
    one = written(trainshort, "a", page="a/report.html")
    assert one.curves("Loss") == ["each step", "mean of 2% of the steps", "validation"]
    assert one.curves("Memory") == ["memory"]
    two = written(trainshort, "a", "b", page="comparison.html")
    assert two.curves("Loss") == ["a, each step", "b, each step", "a", "a, validation", "b", "b, validation"]


def test_lines_of_several_runs_say_which_protocol_they_are(trainshort: Call) -> None:
    plain = {"tokens": 4000, "loss": 1.0, "perplexity": 20.0, "length": 32}
    results = [
        {**plain, "protocol": protocol, "stride": stride}
        for protocol, stride in (("nonoverlapping", 32), ("sliding", 8))
    ]
    for name in ("a", "b"):
        add_report(make_run(Path(name)), {}, results=results)
    page = written(trainshort, "a", "b", page="comparison.html")
    assert "per token; solid: nonoverlapping, dashed: sliding:8" in page.text


def test_figures_of_one_run_begin_with_its_longest_length(trainshort: Call) -> None:
    run = whole_run(Path("run"))
    [file] = run.glob("evaluation/step_*/held-out.json")
    report = json.loads(file.read_text())
    # with scaled positions it is another model
    report["results"] += [{**result, "scale": "linear:4", "perplexity": 9.0} for result in report["results"]]
    file.write_text(json.dumps(report))
    page = written(trainshort, str(run), page="run/report.html")
    assert "Figures perplexity at 128 20.25 4 x trained, 21.25 at 32 position alibi" in page.text
    assert "training loss 4.0000 best 4.0000" in page.text


def test_loss_by_position_is_drawn_where_it_is_known(trainshort: Call) -> None:
    def results(high: float) -> list[dict[str, Any]]:
        known = {"positions": [0, 1, 32, 64], "loss": [9.0, high, None, high / 2]}
        plain = {"protocol": "nonoverlapping", "tokens": 4000, "loss": 1.0, "perplexity": 20.0}
        lengths = [{**plain, "length": length, "stride": length} for length in (32, 64, 128)]
        return [{**each, "loss_by_position": known} for each in lengths[:2]] + lengths[2:]

    for name in ("a", "b"):
        add_report(make_run(Path(name)), {}, results=results(5.0))
    one = written(trainshort, "a", page="a/report.html")
    assert one.curves("Loss by position") == ["32 tokens", "64 tokens"]
    (chart,) = [part for part in one.source.split("<figure")[1:] if "<h3>Loss by position</h3>" in part]
    # neither position 0, which a logarithmic axis has not, nor a loss that is missing
    assert [path.count(",") for path in re.findall(r'<path d="([^"]+)"', chart)] == [2, 2]
    assert "training length 32" in chart
    several = written(trainshort, "a", "b", page="comparison.html")
    assert several.curves("Loss by position") == ["a, 64 tokens", "b, 64 tokens"]


def test_a_heat_map_holds_each_share_by_depth_and_length(trainshort: Call) -> None:
    run_dir = whole_run(Path("run"))
    before = written(trainshort, "run", page="run/report.html")
    assert "Retrieval" not in before.headings
    assert not [tag for tag, attributes in before.tags if attributes.get("class") in ("heat", "word")]
    shares = {"single": {32: {0.0: 1.0, 1.0: 0.25}, 64: {0.0: 0.5, 1.0: 0.0}}, "multi-query": {64: {None: 0.75}}}
    add_retrieval(run_dir, shares)
    add_retrieval(run_dir, {"passkey": {64: {0.5: 0.5}}}, step=5)  # not of the newest checkpoint
    page = written(trainshort, "run", page="run/report.html")
    assert not {"Retrieval", "single", "multi-query", "By task and length"} - {*page.headings}
    assert "passkey" not in page.text
    assert (
        "single on held-out, at step 10 depth 32 1 x 64 2 x recall: generated 0 % 100 50 100 % 25 0 "
        "choice: likeliest of ten 0 % 100 75 100 % 62 50 "
    ) in page.text
    assert "multi-query on held-out, at step 10 depth 64 2 x recall: generated any 75 choice" in page.text
    styled = [attributes for tag, attributes in page.tags if (attributes.get("class") or "").startswith("share")]
    assert [(each["style"], each["class"]) for each in styled[:4]] == [
        ("--share:1.000", "share"),
        ("--share:0.500", "share beyond"),
        ("--share:0.250", "share"),
        ("--share:0.000", "share beyond"),
    ]
    assert styled[2]["title"] == "25 % (15-35) of 20 prompts"
    assert "at step 10; text held-out; means over the depths" in page.text
    assert "single 32 1 62 % (47-76) 81 % (67-90) -2.00 +1.50 40 single 64 2" in page.text


def test_runs_share_a_table_of_tasks_and_of_retrieval(trainshort: Call) -> None:
    for number, name in enumerate(("a", "b")):
        run_dir = make_run(Path(name), checkpoints=(5, 10))
        add_harness(run_dir, [{"task": "arc", "value": 0.1}, {"fewshot": 5, "stderr": None}], step=10 - 5 * number)
        add_retrieval(run_dir, {"single": {32: {0.0: number, 1.0: number}}}, text="x.txt", precision="bf16")
    page = written(trainshort, "a", "b", page="comparison.html")
    assert "longest input 1,024; by lm_eval 0.4.13; version: the task's own" in page.text
    assert (
        "arc acc ↑ a 0.1000 0.0100 1.0 0 1,838 10 arc acc ↑ b 0.1000 0.0100 1.0 0 1,838 5 "
        "piqa acc ↑ a 0.5000 - 1.0 5 1,838 10 piqa acc ↑ b 0.5000 - 1.0 5 1,838 5 "
    ) in page.text
    assert "a, on x.txt in bf16, at step 10" in page.text
    assert "single a 32 1 0 % (0-9) 50 % (35-65) -2.00 +1.50 40 single b 32 1 100 % (91-100)" in page.text
    given = written(trainshort, "b/checkpoints/step_0000010", "--out", "given.html", page="given.html")
    assert "Scores" not in given.headings, "the given checkpoint has none"
    file = Path("a/evaluation/step_0000010/harness/results.json")
    file.write_text('{"torn')
    assert f"{file} is not a report of `trainshort harness`" in refused(trainshort, "report", "a")


def test_scores_are_drawn_only_if_some_were_left_out(trainshort: Call) -> None:
    for name, density in (("all", 1.0), ("some", 0.75)):
        run_dir = make_run(Path(name))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        write_lines(run_dir / "metrics.jsonl", [{**line, "attention_density": density} for line in lines])
    title = "Attention scores computed"
    assert title not in written(trainshort, "all", page="all/report.html").headings
    assert title in written(trainshort, "some", page="some/report.html").headings


def test_the_loss_scale_of_fp16_is_drawn(trainshort: Call) -> None:
    run_dir = make_run(Path("half"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    write_lines(run_dir / "metrics.jsonl", [{**line, "loss_scale": 2.0**16} for line in lines])
    make_run(Path("whole"))
    half, whole = (written(trainshort, name, page=f"{name}/report.html") for name in ("half", "whole"))
    assert {*half.headings} - {*whole.headings} == {"Loss scale"}


def test_a_new_run_says_what_is_missing_and_what_makes_it(trainshort: Call) -> None:
    run_dir = make_run(Path("a run"), steps=0, checkpoints=(), run={"name": "new"})
    page = written(trainshort, "a run", page="a run/report.html")
    assert "No step yet: trainshort train 'a run/config.yaml'" in page.text
    assert "new has no checkpoint to evaluate: first trainshort train" in page.text
    assert page.text.count("Written when training starts:") == 2
    for damaged in ("certificates.jsonl", "environment.json"):
        (run_dir / damaged).write_text('{"step": 1, "ranks": [{}]}\n{"torn')
    assert "Not started yet" in written(trainshort, "a run", page="a run/report.html").text


def test_weights_from_elsewhere_are_not_to_be_trained(trainshort: Call) -> None:
    for name, step, data in (("imported", 0, " --data FILE"), ("mean", 10, "")):
        make_run(Path(name), steps=0, checkpoints=(step,))
        text = written(trainshort, name, page=f"{name}/report.html").text
        assert (text.count(f"{name} was not trained in this folder"), text.count("trainshort train ")) == (5, 0)
        assert f"{name} has no evaluation: trainshort evaluate {name}{data} Training" in text


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
    answer = trainshort("report", "run", "--out", "/proc/none/page.html")
    assert (answer.code, answer.error[:42]) == (3, "error: page /proc/none/page.html cannot be")
    assert {path.name for path in Path().iterdir()} == {"run", "mine.html", "folder.html", "page.html"}
