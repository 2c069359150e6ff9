"""`trainshort study`: what it plans, what it repeats after a stop, what it refuses."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from configs.study import STUDIES, load_study
from data_pipeline.counts import held_out_tokens
from data_pipeline.manifest import load_prepared
from launch.study import execution, submission
from launch.study.processes import Commands
from tests.support.command_line import Answer, Call, contents, refused
from tests.support.studies import StudyFiles, write_study

ALL = [
    "prepare",
    *("train alibi-seed1", "evaluate alibi-seed1", "train alibi-seed2", "evaluate alibi-seed2"),
    *("train rotary-seed1", "evaluate rotary-seed1"),
]
ROWS = Path("study.rows.jsonl")
pytestmark = pytest.mark.usefixtures("folder")
Run = Callable[..., Answer]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> StudyFiles:
    """What stands for the processes of a study; nothing is drawn, and MLflow is left alone."""
    files = StudyFiles()
    monkeypatch.setattr(Commands, "run", lambda self, *arguments: files.run(self, *arguments))
    monkeypatch.setattr("training.study.plot.draw_study", lambda _: None)
    return files


@pytest.fixture
def study(trainshort: Call, files: StudyFiles) -> Run:
    """Execute the study, with changed keys; the calls are those of this start."""

    def run(*options: str, code: int = 0, **changes: Any) -> Answer:
        files.calls.clear()
        answer = trainshort("study", write_study(**changes), *options)
        assert answer.code == code, answer
        return answer

    return run


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def test_numbers_stay_as_they_are_written() -> None:
    name = write_study(set=None)
    with Path(name).open("a") as file:
        file.write("set: {slurm.env: {V: 1.10}, slurm.env.BIG: 1e3, train.learning_rate: 1e-3, train.steps: 1_0}\n")
    run = load_study(name, overrides=[]).runs[0]
    assert run.config.slurm.env == {"V": "1.10", "BIG": "1e3"}
    assert (run.config.train.learning_rate, run.config.train.steps) == (0.001, 10)


def test_runs_differ_from_the_base_and_share_its_data() -> None:
    differing = {"set": {"model.position": "rotary", "data.vocab_size": 700}, "seeds": [7]}
    name = write_study(runs={"alibi": None, "other": differing}, set={"train.steps": 20}, seeds=[1, 2])
    runs = {run.label: run for run in load_study(name, overrides=["train.steps=30", "train.clip=0.5"]).runs}
    assert list(runs) == ["alibi-seed1", "alibi-seed2", "other-seed7"]
    configs = [run.config for run in runs.values()]
    assert [config.run.seed for config in configs] == [1, 2, 7]
    assert {(config.train.steps, config.train.clip) for config in configs} == {(30, 0.5)}
    assert [config.run.dir for config in configs] == [f"study/{label}" for label in runs]
    assert {config.evaluate.lengths for config in configs} == {(32, 64)}
    assert {config.track.tags["trainshort.study"] for config in configs} == {"small"}
    # the base names its data, which a run with another vocabulary cannot use
    assert [config.data.dir for config in configs] == ["data", "data", "study/data-other"]
    assert runs["other-seed7"].differing == {"model.position": "rotary", "data.vocab_size": 700}


def test_all_problems_are_reported_at_once(trainshort: Call) -> None:
    runs = {"alibi": {"seed": 2}, "rotary": {"set": {"model.position": "rotari", "run.seed": 3}}, "ok": {}}
    name = write_study(name=None, runs=runs, set={"heads": 2, "train.stepz": 9}, lengths=[1], seeds=[3, 3], dirr="x")
    message = refused_problems(trainshort("study", name, "--set", "model.position=t5"))
    assert message == [
        "name is missing: add it",
        "unknown key runs.alibi.seed: did you mean seeds?",
        "lengths.0: must be greater than or equal to 2, got 1",
        "unknown key dirr: did you mean dir?",
        "set has 'heads', not a key of a run file: write section.key, as in model.position",
        "--set model.position would replace what runs.rotary.set sets: change it there",
        "runs.rotary.set has run.seed, which a study sets itself: remove it, `seeds` has the seeds",
        "seeds has a seed twice, got [3, 3]: name each once",
        "runs.rotary: model.position: must be 'alibi', 'sinusoidal', 'rotary', 't5', 'kerple', 'sandwich' or 'none', "
        "got 'rotari'",
        "unknown key train.stepz: did you mean steps?",
    ]


def refused_problems(answer: Answer) -> list[str]:
    """Return the problems of a message, in any order but that of the message."""
    assert (answer.code, answer.out) == (2, "")
    head, *problems = answer.error.splitlines()
    assert head == f"error: study.yaml has {len(problems)} problems:"
    return [problem.strip() for problem in problems]


def test_a_file_in_place_of_the_folder_is_named(trainshort: Call) -> None:
    Path("study").touch()
    answer = trainshort("study", write_study())
    assert (answer.code, answer.error.partition(" (")[0]) == (3, "error: study folder study cannot be written")


def test_one_problem_is_one_line(trainshort: Call) -> None:
    for key, value, message in (
        ("base", "none.yaml", "study.yaml: run file none.yaml does not exist: give a YAML file or one of "),
        ("texts", ["held-out", "a/b.txt", "c/b.txt"], "study.yaml: texts has two texts of one name, got held-out, b"),
        ("runs", {"a b": {}}, "study.yaml: runs.a b.[key]: string should match pattern"),
        ("set", {"train.micro_batch": 3}, "study.yaml: train.micro_batch must divide train.global_batch (8), got 3: "),
    ):
        assert refused(trainshort, "study", write_study(**{key: value})).startswith(message)
    assert refused(trainshort, "study", "none").startswith(
        "study none does not exist: give a YAML file or one of extrapolation, headline"
    )
    assert refused(trainshort, "study", write_study(), "--only", "t5").startswith(
        "--only t5 is not a run of small: use one of alibi, alibi-seed1, alibi-seed2, rotary, rotary-seed1"
    )


@pytest.mark.parametrize(("name", "count"), [("extrapolation", 6), ("headline", 3)])
def test_shipped_studies_train_all_runs_on_the_same_tokens(name: str, count: int) -> None:
    assert {path.stem for path in STUDIES.glob("*.yaml")} == {"extrapolation", "headline"}
    loaded = load_study(name, overrides=["data.sources=[book.txt]"])
    configs = [run.config for run in loaded.runs]
    sizes = {(config.train.steps, config.train.global_batch * config.data.sequence_length) for config in configs}
    assert len(sizes) == 1
    assert len({config.data.dir for config in configs}) == 1
    shortest = min(config.data.sequence_length for config in configs)
    assert all(config.evaluate.lengths == tuple(shortest * 2**n for n in range(count)) for config in configs)
    # beside the results: the package's own folder may be read-only
    assert loaded.rows == loaded.folder / "rows.jsonl"


def test_finished_runs_are_not_repeated(study: Run, files: StudyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = study()
    assert files.calls == ALL
    assert [(row["run"], row["seed"]) for row in rows()] == [("alibi", 1), ("alibi", 2), ("rotary", 1)]
    assert "rotary  " in answer.out
    before = contents(Path.cwd())
    assert study().out == answer.out
    assert (files.calls, contents(Path.cwd())) == ([], before)
    for folder in Path("study").glob("*-seed*"):
        shutil.rmtree(folder)  # another machine has the rows alone
    assert (study().out, files.calls) == (answer.out, [])
    ROWS.rename("rows")  # another study is just finishing them
    monkeypatch.setattr(execution, "one_writer", lambda *_, **__: nullcontext(Path("rows").rename(ROWS)))
    assert (study().out, files.calls) == (answer.out, [])


def test_a_stopped_study_goes_on_where_it_stopped(study: Run, files: StudyFiles) -> None:
    files.stops = {"train alibi-seed2"}
    answer = study(code=130)
    assert files.calls == ALL[:4]
    assert "stopped: finished runs are kept; to go on: trainshort study study.yaml\n" in answer.error
    assert "note: not finished: alibi-seed2, rotary-seed1" in answer.out
    files.stops = {"evaluate alibi-seed2"}
    study(code=130)
    assert files.calls == ["prepare", "train alibi-seed2", "evaluate alibi-seed2"]
    files.stops = set()
    study()
    assert files.calls == ["prepare", "evaluate alibi-seed2", *ALL[5:]]
    assert [row["figures"]["steps"] for row in rows()] == [10, 10, 10]


def test_a_run_that_fails_keeps_no_other_from_training(study: Run, files: StudyFiles) -> None:
    files.codes = {"train alibi-seed1": 3, "evaluate rotary-seed1": 1}
    answer = study(code=3)
    assert files.calls == [call for call in ALL if call != "evaluate alibi-seed1"]
    assert "failed: alibi-seed1, rotary-seed1; what failed is said above; to go on: " in answer.error
    assert [(row["run"], row["seed"]) for row in rows()] == [("alibi", 2)]
    files.codes = {"prepare": 2}
    study(code=2)
    assert files.calls == ["prepare"], "without data nothing can be trained"


def test_one_run_alone_is_executed(study: Run, files: StudyFiles) -> None:
    study("--only", "alibi-seed2")
    assert files.calls == ["prepare", "train alibi-seed2", "evaluate alibi-seed2"]
    study("--only", "alibi")
    assert files.calls == ALL[:3]


def test_other_lengths_are_evaluated_without_training(study: Run, files: StudyFiles, trainshort: Call) -> None:
    study("--only", "alibi-seed1")
    study("--only", "alibi-seed1", lengths=[32, 128])
    assert files.calls == ["evaluate alibi-seed1"]
    assert [result["length"] for result in rows()[0]["results"]] == [32, 128]
    shutil.rmtree("study/alibi-seed1")
    write_study(lengths=[32, 256])
    assert refused(trainshort, "study", "study.yaml") == (
        "study.rows.jsonl has no results of alibi-seed1 on held-out at all lengths, and study/alibi-seed1 is not here "
        "to evaluate it: bring the folder, bring back a text that was changed, or remove the line to train the "
        "run again"
    )


def test_a_text_that_was_changed_is_evaluated_again(study: Run, files: StudyFiles, trainshort: Call) -> None:
    other, texts = Path("other.txt"), ["held-out", "other.txt"]
    other.write_text("a text")
    study("--only", "rotary", texts=texts)
    assert files.calls == ["prepare", "train rotary-seed1", *["evaluate rotary-seed1"] * 2]
    before = ROWS.read_text()
    other.write_text("another text")
    study("--only", "rotary", texts=texts)
    assert files.calls == ["evaluate rotary-seed1"]
    hashes = {result["text"]: result["text_sha256"] for result in rows()[0]["results"]}
    assert hashes == {"held-out": "of held-out", "other.txt": hashlib.sha256(b"another text").hexdigest()}
    ROWS.write_text(before)
    shutil.rmtree("study/rotary-seed1")
    assert "has no results of rotary-seed1 on other.txt at all" in refused(trainshort, "study", "study.yaml")
    other.unlink()  # on another machine, where the text is missing too
    assert study("--only", "rotary", texts=texts).out


def test_a_tokenizer_may_change_a_text(study: Run, files: StudyFiles) -> None:
    other, texts = Path("other.txt"), ["held-out", "other.txt"]
    other.write_text("a text")
    study("--only", "rotary", texts=texts)
    spelled = hashlib.sha256(b"a text").hexdigest(), hashlib.sha256(b"A TEXT").hexdigest()
    for file in (ROWS, *Path("study/rotary-seed1/evaluation").rglob("*.json")):
        file.write_text(file.read_text().replace(*spelled).replace("/texts/other.txt", str(other.resolve())))
    os.utime(other, (0, 0))
    files.calls.clear()
    study("--only", "rotary", texts=texts)
    ROWS.unlink()
    study("--only", "rotary", texts=texts)
    assert files.calls == []
    assert spelled[1] in ROWS.read_text()


def test_a_report_of_other_weights_is_no_result(study: Run, files: StudyFiles) -> None:
    study()
    report = Path("study/rotary-seed1/evaluation/step_0000010/held-out.json")
    report.write_text(json.dumps({**json.loads(report.read_text()), "weights_sha256": "other"}))
    ROWS.unlink()
    study()
    assert files.calls == ["evaluate rotary-seed1"]
    assert len(rows()) == 3


def test_a_changed_run_is_refused(study: Run, trainshort: Call) -> None:
    study()
    write_study(set={"parallel.tensor": 2, "checkpoint.every": 2, "track.experiment": "other"})
    assert trainshort("study", "study.yaml", "--dry-run").code == 0, "they decide no result"
    write_study(set={"train.steps": 20, "train.learning_rate": 0.002})
    changes = "train.steps was 10, is 20; train.learning_rate was 0.008, is 0.002"
    assert refused(trainshort, "study", "study.yaml") == (
        f"study.rows.jsonl has alibi-seed1 finished with another configuration ({changes}): set the old values, give "
        "the run another name in the study, or remove its line to train it again"
    )
    ROWS.unlink()
    assert refused(trainshort, "study", "study.yaml") == (
        f"study/alibi-seed1 was begun with another configuration ({changes}): set the old values, give the run another "
        "name in the study, or remove the folder with trainshort runs rm study/alibi-seed1"
    )


def test_a_row_of_an_older_version_lacks_new_keys(study: Run, trainshort: Call) -> None:
    study()
    old = rows()
    for row in old:
        for key in ("model.dropout", "train.batch_warmup", "data.vocab_size"):
            del row["config"][key]
        row["config_sha256"] = "of another version"
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in old))
    shutil.rmtree("study")
    # the first two have a default, which is the value still; a vocabulary has none
    assert "(data.vocab_size was null, is 600)" in refused(trainshort, "study", "study.yaml")


def test_a_broken_row_is_named(study: Run, trainshort: Call) -> None:
    study()
    lines = ROWS.read_text().splitlines()
    ROWS.write_text("\n".join([lines[0], "", lines[1][:-20], lines[2]]))
    assert re.match(
        r"rows file study.rows.jsonl, line 3 is not a row of a study \(the line: Invalid JSON.*\): remove the line to ",
        refused(trainshort, "study", "study.yaml"),
    )
    row = json.loads(lines[0])
    wrong = ("figures.tokens_per_second", {"figures": {**row["figures"], "tokens_per_second": "x"}})
    for where, changed in (
        wrong,
        ("results.0.text", {"results": [{"text": None}]}),
        ("data.sha256", {"data": {"sha256": [1]}}),
    ):
        ROWS.write_text(json.dumps({**row, **changed}) + "\n")
        assert f"line 1 is not a row of a study ({where}: " in refused(trainshort, "study", "study.yaml")


def test_rows_of_other_studies_stay_in_a_shared_file(study: Run) -> None:
    study()
    study(name="second", dir="elsewhere")
    assert [row["study"] for row in rows()] == ["small"] * 3 + ["second"] * 3
    assert {row["results"][0]["text"] for row in rows()} == {"held-out"}


def test_runs_on_other_data_are_refused(study: Run, files: StudyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    study("--only", "alibi-seed1")
    row = rows()[0]
    ROWS.write_text(json.dumps({**row, "data": {"sha256": "0123456789abcdef"}}) + "\n")
    monkeypatch.setattr(execution, "data_facts", lambda _: {"sha256": "fedcba9876543210"})
    assert (
        "study.rows.jsonl has alibi-seed1 trained on other data (sha256 0123456789ab) than that in data (fedcba987654)"
        in study(code=2).error
    )
    assert files.calls == ["prepare"]


def test_lengths_beyond_the_held_out_text_are_refused(study: Run, files: StudyFiles, prepared_once: Path) -> None:
    shutil.copytree(prepared_once / "data", "data")
    tokens = held_out_tokens(load_prepared(load_study(write_study()).runs[0].config.data, folder=Path("data")))
    assert study(code=2, lengths=[32, tokens]).error.endswith(
        f"error: lengths has {tokens}, but the held-out text in data has {tokens} tokens: raise data.split, add text, "
        "or use shorter lengths\n"
    )
    assert files.calls == []
    study(lengths=[32, tokens - 1])


def test_the_plan_has_tokens_and_the_time_that_was_measured(study: Run, files: StudyFiles, trainshort: Call) -> None:
    assert study("--dry-run", "--json", code=2).error.startswith("error: --json is for the results, ")
    plan = study("--dry-run").out
    assert files.calls == []
    assert not Path("study").exists()
    assert "data to prepare first, data: trainshort prepare --set parallel.tensor=1" in plan
    assert "3 runs, 3 to train: 7.68k tokens; their time is known after the first step" in plan
    files.stops = {"train alibi-seed2"}
    study(code=130)
    before = contents(Path.cwd())
    plan = study("--dry-run").out
    assert contents(Path.cwd()) == before
    cells = {line.split()[0]: re.split(r" {2,}", line.strip()) for line in plan.splitlines() if "seed" in line}
    # a step took half a second with seed 1 and half of it with seed 2; rotary gets the mean speed, 768 tokens a second
    assert cells["alibi-seed1"][2:] == ["finished", "10/10", "-", "-"]
    assert cells["alibi-seed2"][2:] == ["to go on at 5", "5/10", "1.28k", "1.2 s"]
    assert cells["rotary-seed1"][1:] == ["model.position: rotary", "new", "0/10", "2.56k", "3.3 s"]
    assert "3 runs, 2 to train: 3.84k tokens, about 4.6 s of training" in plan


def test_a_run_branches_off_from_another_of_the_study(study: Run, files: StudyFiles, trainshort: Call) -> None:
    cooldown = {"train.schedule": "wsd", "train.steps": 15}
    runs = {
        "trunk": {"set": {"train.schedule": "constant"}},
        "named": {"set": {**cooldown, "train.branch_from": "study/trunk-seed1/checkpoints/step_0000010"}},
        "newest": {"set": {**cooldown, "train.branch_from": "study/trunk-seed1"}},
    }
    plan = study("--dry-run", runs=runs).out
    cells = {line.split()[0]: re.split(r" {2,}", line.strip()) for line in plan.splitlines() if "-seed" in line}
    assert "2.56k" in cells["trunk-seed1"]
    assert all("1.28k" in cells[name] for name in ("named-seed1", "newest-seed1")), "the first steps are the trunk's"
    study(runs=runs)
    assert files.calls[1::2] == ["train trunk-seed1", "train named-seed1", "train newest-seed1"]
    # a start writes down which checkpoint of the folder it took, which changes no run of the study
    ROWS.unlink()
    file = Path("study/newest-seed1/config.yaml")
    text = file.read_text()
    file.write_text(text.replace("from: study/trunk-seed1", "from: study/trunk-seed1/checkpoints/step_0000010"))
    study(runs=runs)
    assert files.calls == []
    ROWS.unlink()
    file.write_text(text.replace("from: study/trunk-seed1", "from: study/named-seed1/checkpoints/step_0000010"))
    assert 'train.branch_from was "study/named-seed1/checkpoints/step_0000010", is "study/trunk-seed1"' in refused(
        trainshort, "study", "study.yaml"
    )


def test_submitted_runs_are_left_to_slurm(study: Run, files: StudyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[tuple[str, int, tuple[str, ...]]] = []

    def submit(config: Any, *, nodes: int, folder: Path, names: tuple[str, ...]) -> dict[str, str]:
        submitted.append((config.run.name, nodes, names))
        chain = Path(config.run.dir) / "slurm" / "jobs.json"
        chain.parent.mkdir(parents=True)
        jobs = {"train": "7", "evaluate": "8"}
        chain.write_text(json.dumps({"run": config.run.name, "jobs": jobs, "nodes": 1, "submitted_at": ""}))
        return jobs

    monkeypatch.setattr(submission, "submit_run", submit)
    answer = study("--slurm", set=None)
    assert [name for name, *_ in submitted] == ["alibi-seed1", "alibi-seed2", "rotary-seed1"]
    assert {names for *_, names in submitted} == {("train", "evaluate")}
    assert "alibi-seed1: submitted train as job 7, evaluate as job 8" in answer.error
    assert "alibi-seed1 belongs to SLURM: trainshort jobs status study/alibi-seed1" in study(set=None).error
    assert files.calls == ["prepare"], "nothing was trained here"
    message = study("--slurm", code=2, set=None, texts=["held-out", "book.txt"]).error
    assert "texts has book.txt, but the jobs of a run evaluate only held-out" in message
