"""Pages of `trainshort report` in Chromium, of run folders made by hand: `make test-browser`."""

import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Reader
from tests.support.compared_runs import add_report, make_run
from tests.support.measured_runs import add_harness, add_retrieval
from tests.support.started_runs import certificate, whole_run, write_lines

pytestmark = pytest.mark.browser
STEPS = 100_000
MOST_BYTES, MOST_WRITE_SECONDS, MOST_OPEN_SECONDS = 400_000, 10.0, 5.0


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def shown(reader: Reader) -> dict[str, list[str]]:
    """Return the labels of the curves that are not hidden, by the title of their chart."""
    charts = reader.browser.run("return charts()")
    return {each["title"]: [curve["label"] for curve in each["curves"] if not curve["isHidden"]] for each in charts}


def rows(reader: Reader, selector: str) -> list[list[str]]:
    """Return the cells of a table that are to be seen."""
    script = "return [...document.querySelectorAll(`${arguments[0]} tr`)].map((row) => [...row.cells]" \
        ".filter(isShown).map((cell) => cell.innerText))"  # fmt: skip
    found: list[list[str]] = reader.browser.run(script, selector)
    return found


def three_runs() -> list[str]:
    names = ["short", "middle", "long"]
    for number, name in enumerate(names, 1):
        run_dir = make_run(Path(name), train={"learning_rate": number * 1e-3}, model={"position": "alibi"})
        lines = [{**line, "grad_norm": number, "attention_density": 0.5 + number / 10} for line in lines_of(run_dir)]
        write_lines(run_dir / "metrics.jsonl", lines)
        write_lines(run_dir / "certificates.jsonl", [certificate(step=0, minute=4)])
        known = {"positions": [1, 8, 32, 64], "loss": [4.0, 3.0, 2.5, 2.4 + number / 10]}
        result = {"protocol": "nonoverlapping", "tokens": 4000, "loss": 1.0, "loss_by_position": known}
        results = [{**result, "length": length, "stride": length, "perplexity": number * 20.0} for length in (32, 64)]
        add_report(run_dir, {}, results=results)
    return names


def test_a_whole_run_reads_well(reader: Reader) -> None:
    page = reader.write(str(whole_run(Path("run"))))
    reader.look_at(page, name="whole")
    browser = reader.browser
    titles = browser.run("return [...document.querySelectorAll('.time > [title]')].map((each) => each.title)")
    assert "a save failed after step 8" in titles
    assert browser.run("return outsideOf('.time', 9)") == []
    closed = browser.run("return [...document.querySelectorAll('details')].map((each) => each.open)")
    browser.run("document.querySelectorAll('summary').forEach((each) => each.click())")
    assert closed == [False] * len(closed)
    assert browser.run("return document.querySelector('details').innerText").count("right") == 2


def test_three_runs_are_hidden_and_shown_by_their_names(reader: Reader) -> None:
    page = reader.write(*three_runs())
    reader.look_at(page, name="three")
    browser, before = reader.browser, shown(reader)
    assert before["Perplexity by length"] == ["short", "middle", "long"]
    assert before["Loss by position"] == ["short, 64 tokens", "middle, 64 tokens", "long, 64 tokens"]
    assert rows(reader, "#differences") == [
        ["", "short", "middle", "long"],
        ["train.learning_rate", "0.001", "0.002", "0.003"],
    ]
    browser.run("document.querySelector('[data-shows=\"1\"]').click()")
    after = shown(reader)
    for title, labels in before.items():
        assert [each for each in labels if "middle" not in each] == after.get(title, []), title
    assert rows(reader, "#differences")[1] == ["train.learning_rate", "0.001", "0.003"]
    assert not browser.run("return isShown(document.querySelector('section.run[data-run=\"1\"]'))")
    assert browser.run("return contrasts()[0][0]") >= 4.5, "the name of a hidden run is still to be read"
    # by keyboard: the second button has the focus
    browser.run("document.querySelector('[data-shows=\"1\"]').focus()")
    browser.press("Enter")
    assert shown(reader) == before
    assert browser.run("return document.activeElement.getAttribute('aria-pressed')") == "true"


def test_retrieval_and_tasks_read_well_on_a_phone(reader: Reader) -> None:
    lengths, depths = [32 * 2**power for power in range(7)], [number / 4 for number in range(5)]
    for number, name in enumerate(("short", "long")):
        run_dir = make_run(Path(name))
        single = {
            length: {depth: max(0.0, 1 - depth * place / 4 - number / 9) for depth in depths}
            for place, length in enumerate(lengths)
        }
        add_retrieval(run_dir, {"single": single, "multi-query": {length: {None: 0.5} for length in lengths}})
        tasks = ["lambada_openai", "a_task_of_a_name_that_is_long_enough_to_need_room", "arc_easy"]
        add_harness(run_dir, [{"task": task, "value": 0.1 + number, "samples": 100, "limit": 100} for task in tasks])
    reader.look_at(reader.write("short"), name="measured")
    browser = reader.browser
    browser.show_as(width=360)
    browser.open(reader.write("short"))
    cells = rows(reader, "#retrieval .heat")
    assert cells[2] == ["0 %", *["100"] * 7]
    assert cells[6] == ["100 %", "100", "75", "50", "25", "0", "0", "0"]
    background = "return getComputedStyle(document.querySelectorAll('.heat .share')[arguments[0]]).backgroundColor"
    assert browser.run(background, 0) != browser.run(background, 34)
    assert browser.run("return document.querySelectorAll('td.beyond').length") == 2 * 5 + 2
    assert browser.run("return cutTables()[0].startsWith('task')"), "a heat map needs no scroll bar, a table may"
    browser.show_as(width=718, height=1000, media="print")  # A4
    assert browser.run("return cutTables()") == []
    reader.look_at(reader.write("short", "long"), name="measured-two")
    assert len(rows(reader, "#harness")) == 1 + 2 * 3
    browser.run("document.querySelector('[data-shows=\"1\"]').click()")
    assert [row[2] for row in rows(reader, "#harness")[1:] if row] == ["short"] * 3


def test_charts_tell_values_to_pointer_keys_and_finger(reader: Reader) -> None:
    make_run(Path("run"))
    page = reader.write("run")
    browser = reader.browser
    browser.show_as(width=1400)
    browser.open(page)

    def tip() -> list[str]:
        return [line for line in browser.run("return tipOf('Memory')").split("\n") if line]

    assert tip() == []
    browser.move_to(*browser.run("return placeIn('Memory', 0.999)"))
    assert tip() == ["10", "memory: 2.00 GB"]
    assert browser.run("return isWithin(chartNamed('Memory').parentElement.querySelector('.tip'), window)")
    browser.move_to(1, 1)
    assert tip() == []
    browser.press("Tab")
    assert browser.run("return document.activeElement.matches('svg.chart[tabindex]')")
    browser.run("chartNamed('Memory').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home", "Escape"):
        browser.press(key)
        seen.append(tip()[:1])
    assert seen == [["1"], ["2"], ["10"], ["10"], ["9"], ["1"], []]
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.tap(*browser.run("return placeIn('Memory', 0.5)"))
    assert tip()[0] in ("5", "6"), "the values stay when the finger is lifted"
    browser.tap(*browser.run("return placeIn('Throughput', 0.5)"))
    assert tip() == []
    assert browser.messages() == []


def test_a_page_is_printed_in_ink_on_white(reader: Reader) -> None:
    run_dir = whole_run(Path("run"))
    add_report(run_dir, {2**power: 20.0 for power in range(5, 14)})
    page = reader.write(str(run_dir))
    browser = reader.browser
    browser.show_as(width=718, height=1000, scheme="dark", media="print")  # A4
    browser.open(page)
    assert browser.run("return brightness()") > 0.9
    assert browser.run("return contrasts()[0][0]") >= 4.5
    assert browser.run("return misplacedTexts()") == []
    assert browser.run("return cutTables()") == []
    pdf = browser.pdf()
    if reader.pictures:
        (reader.pictures / "printed.pdf").write_bytes(pdf)
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6


def test_a_run_that_only_started_reads_well(reader: Reader) -> None:
    run_dir = make_run(Path("run"), steps=0, checkpoints=(), run={"name": "new"})
    reader.look_at(reader.write("run"), name="new")
    write_lines(run_dir / "certificates.jsonl", [certificate(step=0, minute=4, refused="positions are wrong")])
    reader.look_at(reader.write("run"), name="refused")
    assert [*shown(reader)] == ["Attention bias per head"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_losses_that_are_no_numbers_break_no_chart(reader: Reader, bad: float) -> None:
    run_dir = make_run(Path("run"))
    lines = [
        {**line, "grad_norm": bad, "learning_rate": 1e-3} | ({"loss": bad} if line["step"] % 2 else {})
        for line in lines_of(run_dir)
    ]
    write_lines(run_dir / "metrics.jsonl", lines)
    add_report(run_dir, {32: 20.0, 64: 1e300})
    reader.look_at(reader.write("run"), name=f"loss-{bad}")
    charts = {each["title"]: each["curves"] for each in reader.browser.run("return charts()")}
    assert charts["Loss"][0]["points"] == (10 if math.isfinite(bad) else 5)
    assert ("Gradient norm" in charts) == math.isfinite(bad)


def test_names_are_shown_as_they_are(reader: Reader) -> None:
    script = '<script>window.harmed = 1</script><img src=x onerror="window.harmed = 1">'
    # runs of one name are told apart by their folders
    names = ["<img src=x onerror=window.harmed=1>", "Größe 日本語 🧪 \u202eolleh", "long-" * 40, "b & c"]
    folders = [names[0], names[1], "/".join(["a" * 60] * 5) + f"/{names[2]}", names[3]]
    for folder in folders:
        run_dir = make_run(Path(folder), run={"name": "same"})
        add_report(run_dir, {32: 20.0, 64: 19.0}, text="<b>ü & long-" + "x" * 80 + ".txt")
        write_lines(run_dir / "certificates.jsonl", [certificate(step=0, minute=4)])
        environment = {"device": script, "platform": "x" * 300, "packages": {script: "1" * 90}}
        (run_dir / "environment.json").write_text(json.dumps(environment))
    for number, folder in enumerate(folders):
        reader.look_at(reader.write(folder), name=f"name-{number}")
    reader.look_at(reader.write(*folders), name="names")
    assert reader.browser.run("return window.harmed === undefined")
    labels = reader.browser.run(
        "return [...document.querySelectorAll('.legend button')].map((each) => each.textContent)"
    )
    assert labels == names


def test_a_hundred_thousand_steps_stay_small_and_quick(reader: Reader) -> None:
    run_dir = make_run(Path("a"), steps=0, train={"steps": STEPS})
    fields = {"tokens_per_second": 1e5, "grad_norm": 1.0, "learning_rate": 1e-3, "memory_gb": 60.0, "step_seconds": 0.1}
    losses = {step: 10 / math.log(step + 3) + 0.2 * math.sin(step * step) for step in range(1, STEPS + 1)}
    lines = [{**fields, "step": step, "loss": loss, "tokens_seen": 1e6 * step} for step, loss in losses.items()]
    write_lines(run_dir / "metrics.jsonl", lines)
    starts = [certificate(step=step, minute=4) for step in range(0, STEPS, 500)]
    write_lines(run_dir / "certificates.jsonl", starts)
    for name in ("b", "c"):
        shutil.copytree(run_dir, name)
    for runs in (["a"], ["a", "b", "c"]):
        began = time.process_time()
        page = reader.write(*runs)
        assert time.process_time() - began < MOST_WRITE_SECONDS * len(runs)
        assert page.stat().st_size < MOST_BYTES * len(runs)
        reader.look_at(page, name=f"many-{len(runs)}")
        assert reader.browser.open(page) < MOST_OPEN_SECONDS
        began = time.monotonic()
        for tenth in range(1, 10):
            reader.browser.move_to(*reader.browser.run("return placeIn('Memory', arguments[0] / 10)", tenth))
            assert "60.0 GB" in reader.browser.run("return tipOf('Memory')")
        assert time.monotonic() - began < MOST_OPEN_SECONDS, "the values follow the pointer"


def test_marks_of_several_lengths_are_told_apart(reader: Reader) -> None:
    for number, length in enumerate((32, 40, 48, 512)):
        run_dir = make_run(Path(f"run{number}"), data={"sequence_length": length}, model={"window": length // 2})
        add_report(run_dir, {32: 20.0, 40: 19.0 + number, 512: 18.0, 8192: 17.0})
    reader.look_at(reader.write("run0", "run1", "run2", "run3"), name="lengths")
    script = (
        "return [...chartNamed('Perplexity by length').querySelectorAll('.marktext')].map((each) => each.textContent)"
    )
    assert reader.browser.run(script) == [f"training length {length}" for length in (32, 40, 48, 512)]
