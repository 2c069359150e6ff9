"""`trainshort compare`: figures of runs, perplexities on the same text, keys that differ, and the plot."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from tests.support.command_line import Call, refused
from tests.support.compared_runs import add_report, make_run
from training.comparison.plot import draw_comparison

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's working directory. Nothing is drawn, which takes time, unless the test asks for `drawn`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.comparison.plot.draw_comparison", lambda *_: None)
    return tmp_path


@pytest.fixture
def drawn(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plot that `compare` draws by default."""
    monkeypatch.setattr("training.comparison.plot.draw_comparison", draw_comparison)
    return here / "comparison.png"


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each row by its name; names and cells are two spaces apart at least."""
    cells = [line.split("  ") for line in text.splitlines()]
    words = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    return {line[0]: line[1:] for line in words if line}


def compared(trainshort: Call, *arguments: str) -> dict[str, Any]:
    answer = trainshort("compare", *arguments, "--json")
    assert answer.code == 0, answer
    document: dict[str, Any] = json.loads(answer.out)
    return document


def test_two_runs_stand_side_by_side_in_80_columns(
    trainshort: Call, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for position, last in (("alibi", 20.5), ("sinusoidal", 3_200_000.0)):
        run_dir = make_run(Path("runs") / position, model={"position": position}, train={"learning_rate": 4e-3})
        add_report(run_dir, {32: 21.25, 64: last})
        add_report(run_dir, {256: 19.5}, stride=16, text="other.txt")
    add_report(Path("runs/alibi"), {32: 21.25, 64: 20.5, 128: 20.25})
    answer = trainshort("compare", "runs/alibi", "runs/sinusoidal")
    assert answer.code == 0
    assert max(map(len, answer.out.splitlines())) <= 80
    shown = rows(answer.out)
    assert shown["position"] == ["alibi", "sinusoidal"]
    assert shown["training length"] == ["32", "32"]
    assert shown["steps"] == ["10", "10"]
    assert shown["tokens"] == ["2.56k", "2.56k"]
    assert shown["training loss"] == ["4.0000", "4.0000"]
    assert shown["validation loss"] == ["3.6000", "3.6000"]
    assert shown["tokens/s, median"] == ["1.00k", "1.00k"]
    assert shown["peak memory"] == ["2.00 GB", "2.00 GB"]
    assert shown["time"] == ["64 s", "64 s"]
    assert (shown["32"], shown["64"], shown["128"]) == (["21.25", "21.25"], ["20.50", "3.2e+06"], ["20.25", "-"])
    assert shown["model.position"] == ["alibi", "sinusoidal"]
    assert "utilization" not in answer.out, "no run knows it"
    assert "train.learning_rate" not in answer.out, "it does not differ"
    assert "note: " not in answer.out
    assert answer.error == "plot: comparison.png\n"
    assert matplotlib.image.imread(drawn).std() > 0.01


def test_json_holds_what_the_tables_show(trainshort: Call, drawn: Path) -> None:
    add_report(make_run(Path("a"), steps=7, checkpoints=(5,)), {32: 20.0, 64: 19.0}, step=5)
    add_report(make_run(Path("b"), train={"steps": 40, "learning_rate": 1e-3}), {64: 18.0}, stride=8)
    document = compared(trainshort, "a", "b", "--out", "plots/ab.png")
    first, second = document["runs"]
    assert (first["label"], first["step"], first["steps"], first["checkpoint"]) == ("a", 7, 10, "step_0000005")
    assert (second["label"], second["step"], second["steps"]) == ("b", 10, 40)
    assert (first["loss"], first["best_loss"]) == (pytest.approx(4.3), pytest.approx(4.3))
    assert (first["validation_loss"], first["best_validation_loss"]) == (pytest.approx(3.7), pytest.approx(3.7))
    assert first["seconds"] == pytest.approx(7 * 6 + 2)
    # 4 layers of 12 x 64^2 weights and 13 x 64 biases and norms; 600 x 64 embeddings; two norms
    assert first["parameters"] == 4 * (12 * 64**2 + 13 * 64) + 600 * 64 + 4 * 64
    assert first["evaluation"]["report"] == "a/evaluation/step_0000005/held-out.json"
    assert document["differences"] == {"train.steps": [10, 40], "train.learning_rate": [8e-3, 1e-3]}
    assert document["perplexity"] == [
        {
            "text": "held-out",
            "unit": "perplexity",
            "results": [
                {"length": 32, "protocol": "nonoverlapping", "values": [20.0, None]},
                {"length": 64, "protocol": "nonoverlapping", "values": [19.0, None]},
                {"length": 64, "protocol": "sliding:8", "values": [None, 18.0]},
            ],
        }
    ]
    assert Path("plots/ab.png").is_file()
    assert not drawn.exists()


def test_the_newest_checkpoint_counts_unless_one_is_given(trainshort: Call) -> None:
    run_dir = make_run(Path("run"), checkpoints=(5, 10))
    add_report(run_dir, {32: 30.0}, step=5)
    (run,) = compared(trainshort, "run")["runs"]
    assert run["evaluation"]["checkpoint"] == "step_0000005"
    answer = trainshort("compare", "run")
    assert "note: run was evaluated at step 5, not at its newest checkpoint: trainshort evaluate run\n" in answer.out
    add_report(run_dir, {32: 20.0}, step=10, newest=False)
    document = compared(trainshort, "run", "run/checkpoints/step_0000005", "./run")
    assert [run["label"] for run in document["runs"]] == ["run step_0000010", "run step_0000005"]
    assert [run["step"] for run in document["runs"]] == [10, 5]
    assert document["perplexity"][0]["results"][0]["values"] == [20.0, 30.0]
    assert document["notes"] == []


def test_labels_of_equal_names_are_told_apart(trainshort: Call) -> None:
    for place in ("x/seed-1", "y/seed-1", "x/seed-2"):
        make_run(Path(place), run={"name": "demo"})
    make_run(Path("other"))
    labels = [run["label"] for run in compared(trainshort, "x/seed-1", "y/seed-1", "x/seed-2", "other")["runs"]]
    assert labels == ["x/seed-1", "y/seed-1", "seed-2", "other"]


def test_advice_names_the_precision_that_compares(trainshort: Call) -> None:
    for name in ("a", "b"):
        make_run(Path(name), checkpoints=(5, 10))
    add_report(Path("a"), {32: 20.0}, step=5, precision="bf16").rename("a/evaluation/step_0000005/held-out-bf16.json")
    advice = "a was evaluated at step 5, not at its newest checkpoint: trainshort evaluate a --precision bf16"
    assert advice in compared(trainshort, "a", "b")["notes"]
    notes = compared(trainshort, "a", "b", "--text", "held-out-bf16")["notes"]
    assert "b has no evaluation of held-out-bf16: trainshort evaluate b --precision bf16" in notes


def test_different_tokens_of_one_text_are_told(trainshort: Call) -> None:
    for name in ("a", "b"):
        add_report(make_run(Path(name)), {32: 20.0, 64: 19.0, 128: 18.0})
    assert compared(trainshort, "a", "b")["notes"] == []
    path = Path("b/evaluation/step_0000010/held-out.json")
    report = json.loads(path.read_text())
    for result, tokens in zip(report["results"], (3968, 4000, 3968), strict=True):
        result |= {"tokens": tokens, "same_tokens": True}
    path.write_text(json.dumps(report))
    (note,) = compared(trainshort, "a", "b")["notes"]
    assert note.startswith("nonoverlapping at 32, nonoverlapping at 128 on held-out: the runs scored different tokens")
    path.write_text(json.dumps({**report, "tokenizer_sha256": "two"}))
    (note,) = compared(trainshort, "a", "b")["notes"]
    assert note.startswith("the tokenizers differ: "), "other tokens by nature"


def test_as_many_tokens_elsewhere_are_told(trainshort: Call) -> None:
    for name, ends_every in (("a", 2000), ("b", 3000)):
        report = add_report(make_run(Path(name)), {32: 20.0})
        contents = json.loads(report.read_text())
        contents["results"][0] |= {"protocol": "last", "scored": 8, "tokens": 8, "windows_end_every": ends_every}
        report.write_text(json.dumps(contents))
    (note,) = compared(trainshort, "a", "b")["notes"]
    assert note.startswith("last:8 at 32 on held-out: the runs scored different tokens")


def test_different_texts_are_never_compared(trainshort: Call) -> None:
    for name, text in (("a", "held-out"), ("b", "held-out"), ("c", "mine.txt")):
        run_dir = make_run(Path(name))
        add_report(run_dir, {32: 15.0}, text="book.txt")
        add_report(run_dir, {32: 20.0}, text=text)
    add_report(Path("b"), {32: 21.0}, text_sha256="of other data")
    answer = trainshort("compare", "a", "b", "c")
    assert "note: evaluated on texts that differ" in answer.out
    assert answer.out.endswith("All were evaluated on book: add --text book\n")
    shutil.rmtree("c/evaluation/step_0000010")
    answer = trainshort("compare", "a", "b", "c")
    assert answer.out.endswith("Evaluate each with the same --data FILE, then compare with --text FILE\n")
    add_report(Path("c"), {32: 15.0}, text="book.txt", newest=False)
    document = compared(trainshort, "a", "b", "c")
    assert [text["results"][0]["values"] for text in document["perplexity"]] == [
        [20.0, None, None],
        [None, 21.0, None],
        [None, None, 20.0],
    ]
    (on_book,) = compared(trainshort, "a", "b", "c", "--text", "book.txt")["perplexity"]
    assert (on_book["text"], on_book["results"][0]["values"]) == ("book.txt", [15.0, 15.0, 15.0])
    add_report(Path("c"), {32: 15.0}, text="mine.txt")
    answer = trainshort("compare", "a", "c", "--text", "mine.txt")
    assert "note: a has no evaluation of mine.txt: trainshort evaluate a --data FILE\n" in answer.out


def test_other_masked_documents_are_another_text(trainshort: Call) -> None:
    for name, documents in (("masked", "33" * 32), ("whole", None), ("old", "not recorded")):
        add_report(make_run(Path(name)), {32: 20.0}, documents_sha256=documents)
    file = Path("old/evaluation/step_0000010/held-out.json")
    report = json.loads(file.read_text())
    del report["documents_sha256"]
    file.write_text(json.dumps(report))
    answer = trainshort("compare", "masked", "whole")
    assert answer.out.endswith(
        "note: evaluated with masked documents that differ, so their perplexities do not compare: masked on held-out, "
        "documents masked; whole on held-out. Evaluate each with the same --data FILE, then compare with --text FILE "
        "(text in one file is one document)\n"
    )
    assert len(compared(trainshort, "masked", "whole")["perplexity"]) == 2
    for name in ("masked", "whole"):  # the older version's goes by its text alone
        (text,) = compared(trainshort, name, "old")["perplexity"]
        assert text["results"][0]["values"] == [20.0, 20.0]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_text_is_found_by_label_content_and_path(trainshort: Call, here: Path) -> None:
    run_dir = make_run(Path("run"))
    kept = {}
    for place, text in (("x", "one text"), ("y", "another text")):
        file = here / place / "book.txt"
        file.parent.mkdir()
        file.write_text(text)
        facts = {"data": {"name": "book.txt", "tokens": 5000, "words": 1000}, "text_path": str(file)}
        label = f"book-{sha256(text)[:8]}" if kept else "book"
        perplexity = 10.0 * (1 + len(kept))
        add_report(run_dir, {32: perplexity}, text=f"{label}.txt", text_sha256=sha256(text), **facts)
        kept[place] = (label, perplexity)

    def found(name: str) -> tuple[str, float]:
        (text,) = compared(trainshort, "run", "--text", name)["perplexity"]
        return text["text"], text["results"][0]["values"][0]

    for place, expected in kept.items():
        assert found(f"{place}/book.txt") == found(expected[0]) == expected
    (here / "copy.txt").write_text("another text")
    assert found("copy.txt") == kept["y"], "the same content"
    facts = {"data": {"name": "copy.txt"}, "text_path": str(here / "copy.txt"), "newest": False}
    add_report(run_dir, {32: 30.0}, text="copy.txt", text_sha256=sha256("another text"), **facts)
    assert found("copy.txt") == ("copy.txt", 30.0), "the same content and path"
    assert found("y/book.txt") == kept["y"]
    (here / "third.txt").write_text("another text")
    assert found("third.txt") in (("copy.txt", 30.0), kept["y"]), "one text under two names"
    (here / "x" / "book.txt").unlink()
    assert found("x/book.txt") == kept["x"], "the same path"
    assert f"on {kept['y'][0]}" in rows(trainshort("compare", "run").out), "the newest report"
    line = refused(trainshort, "compare", "run", "--text", "book.txt")
    assert line == f"--text book.txt is the name of several texts: give one of book, {kept['y'][0]}"
    (here / "book.txt").write_text("a third text")
    assert refused(trainshort, "compare", "run", "--text", "book.txt").startswith(
        f"--text book.txt: no run was evaluated on it, there are book, {kept['y'][0]}, copy: "
    )


def test_a_text_that_no_run_has_is_refused(trainshort: Call, drawn: Path) -> None:
    for name in ("a", "b"):
        make_run(Path(name))
    typo = ("compare", "a", "b", "--text", "bok.txt")
    assert "no run was evaluated on it, they have no evaluation yet: " in refused(trainshort, *typo)
    add_report(Path("a"), {32: 20.0})
    add_report(Path("b"), {32: 20.0}, text="book.txt")
    assert "no run was evaluated on it, there are book, held-out: " in refused(trainshort, *typo)
    assert not drawn.exists()


def test_a_name_with_a_line_break_is_one_line_of_the_plot(
    trainshort: Call, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("training.comparison.plot.save_figure", lambda figure, path, **_: figures.append(figure))
    names = ("a\nb\x1b[2J", "long" * 20, "cost $1$ and $2^$")
    for name in names:
        add_report(make_run(Path(name), run={"name": "demo"}), {32: 20.0, 64: 19.0})
    assert trainshort("compare", *names).code == 0
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        r"a\nb\x1b[2J",
        "long" * 9 + "l...",
        "cost $1$ and $2^$",
    ]
    figures[0].draw_without_rendering()


def test_other_tokenizers_are_compared_per_word(trainshort: Call) -> None:
    add_report(make_run(Path("a")), {32: 20.0})
    add_report(make_run(Path("b")), {32: 22.0}, tokenizer_sha256="two")
    (text,) = compared(trainshort, "a", "b")["perplexity"]
    assert (text["unit"], text["results"][0]["values"]) == ("word_perplexity", [200.0, 220.0])
    answer = trainshort("compare", "a", "b")
    assert "perplexity per word" in answer.out
    assert "note: the tokenizers differ" in answer.out


def test_a_run_without_evaluation_says_what_to_type(trainshort: Call) -> None:
    make_run(Path("my run"), run={"name": "plain"})
    add_report(make_run(Path("b")), {32: 20.0})
    make_run(Path("new"), checkpoints=())
    make_run(Path("imported"), steps=0, checkpoints=(0,))
    answer = trainshort("compare", "my run", "b", "new", "imported")
    assert answer.code == 0
    assert rows(answer.out)["steps"] == ["10", "10", "10", "0"]
    assert "note: imported has no evaluation: trainshort evaluate imported --data FILE\n" in answer.out
    assert "note: plain has no evaluation: trainshort evaluate 'my run'\n" in answer.out
    assert "note: new has no checkpoint yet, so there is nothing to evaluate\n" in answer.out
    assert rows(answer.out)["32"] == ["-", "20.00", "-", "-"]


def test_a_note_on_an_older_step_names_the_text(trainshort: Call) -> None:
    for name in ("a", "b"):
        add_report(
            make_run(Path(name), checkpoints=(5, 10)),
            {32: 20.0},
            step=5,
            text="book.txt",
            text_path="/texts/my book.txt",
        )
    for arguments in (("a", "b", "--text", "book.txt"), ("a", "b")):
        notes = compared(trainshort, *arguments)["notes"]
        assert notes[0] == (
            "a was evaluated at step 5, not at its newest checkpoint: trainshort evaluate a --data '/texts/my book.txt'"
        )
    older = json.loads(Path("a/evaluation/step_0000005/book.json").read_text())
    Path("a/evaluation/report.json").write_text(json.dumps({k: v for k, v in older.items() if k != "text_path"}))
    add_report(Path("b"), {32: 20.0}, step=5)
    held_out, unnamed = compared(trainshort, "b", "a")["notes"][:2]
    assert held_out.endswith(": trainshort evaluate b")
    assert unnamed.endswith(": trainshort evaluate a --data FILE")


def test_a_run_of_0_1_0_is_compared(trainshort: Call) -> None:
    shutil.copytree(OLD_RUN, "old")
    report = json.loads(add_report(Path("old"), {32: 20.0}, step=2).read_text())
    older = {key: report[key] for key in ("checkpoint", "step", "train_length", "data", "results")}
    Path("old/evaluation/step_0000002/held-out.json").unlink()
    Path("old/evaluation/step_0000002/report.json").write_text(json.dumps(older))
    add_report(make_run(Path("new")), {32: 19.0})
    document = compared(trainshort, "old", "new")
    assert document["perplexity"][0]["results"][0]["values"] == [20.0, 19.0]
    assert document["runs"][0]["evaluation"]["checkpoint"] == "step_0000002"
    assert document["notes"] == []


def test_metrics_that_a_crash_tore_are_read(trainshort: Call) -> None:
    make_run(Path("run"))
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": NaN, "tokens_seen": 3000}\n[]\n"x"\n{"step": 12, "loss": \n{"step": 12, "lo')
    (run,) = compared(trainshort, "run")["runs"]
    assert (run["step"], run["loss"]) == (11, pytest.approx(4.0))


def test_what_is_no_run_is_refused_in_one_line(trainshort: Call, here: Path) -> None:
    make_run(Path("good"))
    (here / "empty").mkdir()
    (here / "file.txt").touch()
    assert refused(trainshort, "compare", "good", "nowhere").startswith("run nowhere does not exist: ")
    assert refused(trainshort, "compare", "good", "file.txt").startswith("run file.txt is a file: ")
    assert refused(trainshort, "compare", "good", "empty").startswith("empty holds no run, ")
    make_run(Path("torn"))
    Path("torn/config.yaml").write_text("run: [")
    assert "torn/config.yaml" in refused(trainshort, "compare", "torn", "good")
    report = add_report(make_run(Path("bad")), {32: 20.0})
    report.write_text("{}")
    assert f"{report} is not a report" in refused(trainshort, "compare", "bad", "good")
    Path("bad/checkpoints/step_0000010/manifest.json").write_text("{")
    assert "broken manifest.json" in refused(trainshort, "compare", "bad/checkpoints/step_0000010")


@pytest.mark.parametrize("out", ["mine.png", "plot.pdf", "folder.png", "mine"])
def test_other_files_are_never_overwritten(trainshort: Call, here: Path, out: str) -> None:
    make_run(Path("run"))
    (here / "folder.png").mkdir()
    matplotlib.image.imsave(here / "mine.png", [[0.0, 1.0]])
    assert refused(trainshort, "compare", "run", "--out", out).startswith(f"--out {out} ")


def test_a_plot_of_compare_is_overwritten(trainshort: Call, drawn: Path) -> None:
    make_run(Path("run"))
    assert trainshort("compare", "run").code == 0
    before = drawn.stat()
    assert trainshort("compare", "run").code == 0
    assert drawn.stat().st_ino != before.st_ino


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_runs_is_drawn(trainshort: Call, drawn: Path, count: int) -> None:
    names = [f"run-{number}-{'long' * 20}" for number in range(count)]
    for number, name in enumerate(names):
        run_dir = make_run(Path(name), data={"sequence_length": 32 * (number + 1)})
        add_report(run_dir, {32: 20.0 + number, 64: 20.0 * 10 ** (2 * number), 96: 1e250 if number else 20.0})
    answer = trainshort("compare", *names)
    assert answer.code == 0
    assert matplotlib.image.imread(drawn).std() > 0.01


def test_help_says_what_is_overwritten_and_defaults(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = trainshort("compare", "--help")
    assert "only a plot of this command is ever overwritten.  [default: comparison.png]" in answer.out
    assert "[default: the run's held-out text]" in trainshort("evaluate", "--help").out
