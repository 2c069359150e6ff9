"""The shipped demo, made small, as a user runs it: prepare, train, stop, resume, evaluate, export, generate.

What reads a checkpoint in one process runs in the test's own, which has imported what would take longer than the work.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sqlite3
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib.image
import pytest
import torch

from tests.support.command_line import run_here
from tests.support.processes import PATIENCE_SECONDS, PROGRAM, exact, metrics, trainshort, wait_until
from tests.support.small_run import WHOLE_JOB, overrides_of, set_options
from training.checkpoint.manifest import list_checkpoints
from training.checkpoint.read import open_checkpoint
from training.evaluation.request import EvaluationRequest
from training.evaluation.usable import usable_length
from training.export.hf_baseline import evaluate_folder
from training.model.single import load_single
from training.reproduction.starts import recorded_starts

# MLflow's own, of its database.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
PROMPT = topics["with"][:1200]  # longer than the training length
# The demo's own model, on fewer and shorter samples, with what a bit-for-bit repetition asks for on a GPU.
HOOK = 'track.hook=echo "$TRAINSHORT_EVENT $TRAINSHORT_STEP" >>events'
BACKGROUND = ("--set", "checkpoint.background=true", "--set", HOOK)
OVERRIDES = overrides_of(WHOLE_JOB, {"train": {"micro_batch": 8, "deterministic": True}, "evaluate": {"samples": 16}})
ON_RANKS = set_options(["evaluate.tensor=2"])  # any start may add them
STEPS: int = WHOLE_JOB["train"]["steps"]
LENGTH: int = WHOLE_JOB["data"]["sequence_length"]


@dataclass(frozen=True)
class Job:
    """Output and files of the commands.

    Attributes:
        folder: Where they ran; the run folders are one/run and two/run.
        stopped: The metrics of the first start, which ended on Ctrl-C.
        saved: The steps of its checkpoints.
        resumed: What the second start said.
        split: Output of `evaluate --json` on the ranks that the run file says.
        report: Output of `evaluate --json` in one process, afterwards.
        exported: Output of `export`.
        generated: Output of `generate --json` for a prompt longer than the training length.
        reproduced: Output of `reproduce --json` for the unbroken run.
        again: Output of `train` when the run was finished.
        changed: Files that this `train` changed.
    """

    folder: Path
    stopped: list[dict[str, Any]]
    saved: list[int]
    resumed: str
    split: str
    report: str
    exported: str
    generated: str
    reproduced: str
    again: str
    changed: set[Path]

    @property
    def broken(self) -> Path:
        return self.folder / "one" / "run"

    @property
    def unbroken(self) -> Path:
        return self.folder / "two" / "run"


def done(folder: Path, *arguments: str) -> str:
    """Run a command that must succeed, and return its output."""
    process = trainshort(folder, *arguments)
    assert process.returncode == 0, f"{arguments}:\n{process.stderr[-4000:]}"
    return process.stdout


def done_here(folder: Path, *arguments: str) -> str:
    """Run a command that must succeed in this process, and return its output."""
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        assert run_here(*arguments) == 0, arguments
    return output.getvalue()


def run(run_dir: str) -> list[str]:
    return ["demo", *set_options([*OVERRIDES, f"run.dir={run_dir}"])]


def train_and_stop(folder: Path, run_dir: str, *, after_lines: int) -> None:
    """Train until there are some lines of metrics, then press Ctrl-C; checkpoints are written in the background."""
    with (folder / "first.log").open("w+") as log:
        command = [*PROGRAM, "train", *run(run_dir), *BACKGROUND]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

        def enough_lines() -> bool:
            assert process.poll() is None, log.read()
            return len(metrics(folder / run_dir)) >= after_lines

        try:
            wait_until(enough_lines, lambda: "no metrics", pause_seconds=0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=PATIENCE_SECONDS) == 0, log.read()
        finally:
            process.kill()
            process.wait()


def states(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Run every command once."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "book.txt").write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    done(folder, "prepare", *run("one/run"))
    train_and_stop(folder, "one/run", after_lines=2)
    stopped = metrics(folder / "one" / "run")
    saved = [each.step for each in list_checkpoints(folder / "one" / "run")]
    resumed = trainshort(folder, "train", *run("one/run"), *BACKGROUND, *ON_RANKS)
    assert resumed.returncode == 0, resumed.stderr
    before = states(folder)
    again = done(folder, "train", *run("one/run"))
    after = states(folder)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    with ThreadPoolExecutor(1) as pool:  # at the same time: the end of that run is one process, its export
        unbroken = pool.submit(done, folder, "train", *run("two/run"), "--set", f"checkpoint.export_every={STEPS}")
        evaluate = ("evaluate", "one/run", "--lengths", f"{LENGTH},{2 * LENGTH}", "--json")
        split = done(folder, *evaluate)
        report = done_here(folder, *evaluate, "--tensor", "1", "--pipeline", "1")
        exported = done_here(folder, "export", "one/run", "--format", "hf", "--out", "one/run/export/hf")
        generated = done_here(folder, "generate", "one/run", "--prompt", PROMPT, "--tokens", "40", "--greedy", "--json")
        unbroken.result()
    reproduced = done_here(folder, "reproduce", "two/run", "--json", "--verify")
    return Job(folder, stopped, saved, resumed.stderr, split, report, exported, generated, reproduced, again, changed)


def test_a_stopped_run_has_saved_the_last_step_that_it_finished(job: Job) -> None:
    steps = [line["step"] for line in job.stopped]
    assert 2 <= len(steps) < STEPS, "the stop came too late to test anything"
    assert steps == list(range(1, len(steps) + 1))
    assert job.saved == sorted({*range(4, len(steps) + 1, 4), len(steps)})


def test_a_command_is_told_of_both_starts(job: Job) -> None:
    stop = len(job.stopped)
    later = [f"saved {step}" for step in range(4, STEPS + 1, 4) if step > stop]
    assert (job.folder / "events").read_text().splitlines() == [
        *["started 0", *(f"saved {step}" for step in job.saved), f"stopped {stop}"],
        *[f"started {stop}", *later, f"finished {STEPS}"],
    ]


def test_a_file_and_the_log_have_all_progress(job: Job) -> None:
    first, second = (job.folder / "first.log").read_text(), job.resumed
    assert (job.broken / "logs" / "rank_0.log").read_text() == first + second
    assert "\x1b" not in first + second
    assert all(len(line) <= 80 for line in second.splitlines() if "/" not in line and "deterministic" not in line)
    stop, last = len(job.stopped), f"one/run/checkpoints/step_{STEPS:07d}"
    begin, *_ = first.splitlines()
    assert begin.endswith("  demo in one/run")
    for words in (
        f" parameters; {STEPS} steps, 24.6k tokens in all\n",
        "4 CPU ranks: tensor 2 x pipeline 2 x data 1, ZeRO-1, fp32\n"
        "attention sdpa, lossless windows: all scores at length 128\nimporting torch",
        "ALiBi verified on 4 ranks: attention sdpa, fp32, ",
        "building the index of samples, data/index/",
        "starting new: one/run has no checkpoint\nMLflow: sqlite:",
        "\ntraining from step 1\nstep 1/12  loss ",
        "\nsaving, press again to end without saving\n",
        f"\nsaved step {stop}: one/run/checkpoints/step_{stop:07d} (",
        f"\nstopped after step {stop}, saved: start again to continue\ntotal ",
        f"\nto continue: {shlex.join(['trainshort', 'train', *run('one/run'), *BACKGROUND])}\n",
    ):
        assert words in first, first
    for words in (
        f"\nto go: {STEPS - stop} steps, ",
        f"\nresuming from step {stop}, one/run/checkpoints/step_{stop:07d}\n",
        f"\ntraining from step {stop + 1}\nstep {stop + 1}/{STEPS}  loss ",
        f"\nstep {STEPS}/{STEPS}  loss ",
        f"\nsaved step {STEPS}: {last} (",
        " tokens/s (training alone), peak memory ",
    ):
        assert words in second, second
    assert second.endswith("\nnext: trainshort evaluate one/run\n")
    output = first + second
    assert re.findall(r"^validation at step (\d+): loss ", output, re.MULTILINE) == ["5", "10"]
    saves = [int(step) for step in re.findall(r"^saved step (\d+): ", output, re.MULTILINE)]
    assert saves == sorted({*job.saved, *range(4, STEPS + 1, 4)})
    best = min((line["validation_loss"], line["step"]) for line in metrics(job.broken) if "validation_loss" in line)
    assert f"best validation: loss {best[0]:.4f} at step {best[1]}\n" in second


def test_stopped_and_started_again_equals_unbroken_bit_for_bit(job: Job) -> None:
    broken, unbroken = metrics(job.broken), metrics(job.unbroken)
    assert [line["step"] for line in unbroken] == list(range(1, STEPS + 1))
    assert exact(job.broken) == exact(job.unbroken)
    said = "train.deterministic: losses repeat bit for bit in this layout, with these packages, on this kind of CPU and"
    assert said in (job.folder / "first.log").read_text()
    assert broken[: len(job.stopped)] == job.stopped, "a line from before the stop has changed"
    assert [line["step"] for line in broken if "validation_loss" in line] == [5, 10]
    one, two = open_checkpoint(job.broken), open_checkpoint(job.unbroken)
    assert (one.step, two.step) == (STEPS, STEPS)
    for name, weight in one.weights().items():
        assert torch.equal(weight, two.tensor(name, kind="weight")), name


def test_every_start_records_what_decides_its_result(job: Job) -> None:
    starts = recorded_starts(job.broken)
    assert [start["step"] for start in starts] == [0, len(job.stopped)]
    typed = ["trainshort", "train", *run("one/run"), *BACKGROUND]
    assert [start["command"] for start in starts] == [shlex.join(typed), shlex.join([*typed, *ON_RANKS])]
    document = json.loads(job.reproduced)
    assert (document["differences"], document["changes"], document["grade"]) == ([], [], "same")
    assert document["commands"] == ["trainshort train two/run/config.yaml --ranks 4 --set run.dir=two/run-again"]


def test_a_finished_run_is_left_alone(job: Job) -> None:
    first, best, then = job.again.splitlines()
    assert first == f"one/run is trained to its last step, {STEPS}: raise train.steps to continue"
    assert best.startswith("best validation: loss ")
    assert then == "next: trainshort evaluate one/run"
    # Every start of ranks writes config.yaml again, so no rank was started.
    assert job.changed == set()


def test_the_model_has_learned(job: Job) -> None:
    losses = [line["loss"] for line in metrics(job.unbroken)]
    assert losses[-1] < losses[0] - 1


def test_evaluation_prints_its_report_and_saves_it(job: Job) -> None:
    report = json.loads(job.report)
    assert report == json.loads((job.broken / "evaluation" / "report.json").read_text())
    assert report["train_length"] == LENGTH
    assert (report["position"], report["attention"], report["precision"]) == ("alibi", "sdpa", "fp32")
    assert [result["length"] for result in report["results"]] == [LENGTH, 2 * LENGTH]
    assert report["checkpoint"] == str(job.broken / "checkpoints" / f"step_{STEPS:07d}")
    (plot,) = (job.broken / "evaluation").glob("*.png")
    assert matplotlib.image.imread(plot).std() > 0.01
    # Held-out text after few steps: better than the first step, and not much better than the training text.
    losses = [line["loss"] for line in metrics(job.broken)]
    assert all(losses[-1] - 1 < result["loss"] < losses[0] for result in report["results"])


def test_the_exported_model_has_the_logits_of_the_trained_one(job: Job) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = job.broken / "export" / "hf"
    assert job.exported.startswith(f"exported one/run/export/hf: at lengths {LENGTH} and {4 * LENGTH} logits differ by")
    assert job.exported.endswith("\nexported: one/run/export/hf\n")
    assert json.loads((folder / "config.json").read_text())["seq_length"] == usable_length(json.loads(job.report))
    text = topics["with"]
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, : 4 * LENGTH]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits
    assert tokens.shape == (1, 4 * LENGTH)
    torch.testing.assert_close(logits, load_single(open_checkpoint(job.broken)).logits(tokens), atol=1e-4, rtol=0)


def test_ranks_and_the_export_have_the_perplexity(job: Job) -> None:
    """Of the trained model, at every length: on two ranks, in one process, and through transformers."""
    lengths = (LENGTH, 2 * LENGTH)
    ours, split = json.loads(job.report), json.loads(job.split)
    with contextlib.chdir(job.folder):  # where data.dir is
        theirs = evaluate_folder(job.broken, job.broken / "export" / "hf", EvaluationRequest(lengths=lengths))
    for others in (split["results"], theirs["results"]):
        for one, other in zip(ours["results"], others, strict=True):
            assert (one["length"], one["tokens"]) == (other["length"], other["tokens"])
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
            assert one["standard_error"] == pytest.approx(other["standard_error"], rel=1e-3)
            assert one["loss_by_position"]["loss"] == pytest.approx(other["loss_by_position"]["loss"], rel=1e-4)
    assert json.loads((job.broken / "evaluation" / "report.json").read_text()) == ours, "it is the run's own"
    assert "--tensor" not in split["command"], "the run file says on which ranks"
    said = (job.broken / "logs" / "evaluate" / "rank_0.log").read_text()
    assert f"1/2  nonoverlapping at {LENGTH}: loss " in said


def test_a_run_has_exported_its_last_step_before_it_ends(job: Job) -> None:
    by_run, by_hand = job.unbroken / "exports" / f"step-{STEPS:08d}", job.broken / "export" / "hf"
    assert (by_run / "model.safetensors").read_bytes() == (by_hand / "model.safetensors").read_bytes()
    assert {path.name for path in by_run.iterdir()} == {path.name for path in by_hand.iterdir()}
    told = (job.unbroken / "logs" / "rank_0.log").read_text()
    assert (
        f"\ntraining has ended: waiting for the export of step {STEPS}\nexported step {STEPS} to two/run/exports/"
        in told
    )
    logged = (job.unbroken / "logs" / f"export-{STEPS:08d}.log").read_text()
    assert logged.endswith(f"\nexported: two/run/exports/step-{STEPS:08d}\n")
    with closing(sqlite3.connect(job.folder / "two" / "mlflow.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)] * 2, "and the export"
    assert len([*(job.folder / "two" / "mlartifacts").rglob("export/certificate.json")]) == 1


def test_tokens_past_the_training_length_equal_transformers(job: Job) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = job.broken / "export" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    generated = json.loads(job.generated)
    assert prompt.input_ids.shape[1] == generated["prompt_tokens"] > LENGTH
    assert generated["token_ids"] == expected[prompt.input_ids.shape[1] :].tolist()
    assert generated["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert generated["tokens"] == 40


def test_every_start_and_the_export_leave_a_certificate(job: Job) -> None:
    exported = json.loads((job.broken / "export" / "hf" / "certificate.json").read_text())
    assert [rank["heads"] for rank in exported["ranks"]] == [[0, 1, 2, 3]]
    starts = [json.loads(line) for line in (job.broken / "certificates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in starts] == [0, job.saved[-1]], "the export is no start"
    for start in starts:
        # tensor 2 x pipeline 2: each stage has each head once
        assert [rank["heads"] for rank in start["ranks"]] == [[0, 1], [2, 3], [0, 1], [2, 3]]
        assert [rank["stage"] for rank in start["ranks"]] == [0, 0, 1, 1]
        for rank in start["ranks"]:
            slopes = [2.0 ** -(2 * (head + 1)) for head in rank["heads"]]
            assert rank["slopes_sha256"] == hashlib.sha256(struct.pack("<2f", *slopes)).hexdigest()
            assert rank["error"] < 1e-6
            assert rank["recency"] > 0


def test_mlflow_has_all_starts_and_the_evaluation_in_one_run(job: Job) -> None:
    with closing(sqlite3.connect(job.folder / "one" / "mlflow.db")) as database:
        runs = database.execute("select run_uuid, name, status from runs order by start_time").fetchall()
        parents = database.execute("select value from tags where key = 'mlflow.parentRunId'").fetchall()
        losses = database.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        evaluated = database.execute("select distinct key from metrics where key like 'evaluation/%'").fetchall()
        digests = {digest for (digest,) in database.execute("select digest from datasets")}
    (run_id, name, status), *nested = runs
    assert (name, status) == ("demo", "FINISHED")
    last = f"step_{STEPS:07d}"
    assert {run[1:] for run in nested} == {
        (f"evaluate {last}, held-out", "FINISHED"),
        (f"export {last}, hf", "FINISHED"),
    }
    assert parents == [(run_id,)] * len(nested)
    data = json.loads((job.broken / "reproduce.json").read_text())["starts"][-1]["data"]
    assert {data["sha256"][:36], data["tokenizer_sha256"][:36]} <= digests
    assert json.loads((job.broken / "mlflow_run.json").read_text())["run_id"] == run_id
    assert losses == [(line["step"], line["loss"]) for line in metrics(job.broken)]
    prefix = "evaluation/held-out/nonoverlapping"
    names = ("loss", "perplexity", "bits_per_byte", "standard_error", "attention_density")
    assert {key for (key,) in evaluated} == {
        "evaluation/held-out/usable_length",
        f"{prefix}/{last}/perplexity",
        *(f"{prefix}/{length}/{name}" for length in (LENGTH, 2 * LENGTH) for name in names),
    }
    artifacts = job.folder / "one" / "mlartifacts" / run_id / "artifacts"
    assert {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()} == {
        "certificates.jsonl",
        "config.yaml",
        "environment.json",
        "reproduce.json",
        "evaluation/held-out.json",
        f"evaluation/{last}/held-out.json",
        f"evaluation/{last}/held-out.md",
        f"evaluation/{last}/held-out.png",
        "export/certificate.json",
        "export/export.json",
    }


def test_the_commands_leave_only_the_files_asked_for(job: Job) -> None:
    assert sorted(os.listdir(job.folder)) == ["book.txt", "data", "events", "first.log", "one", "two"]
    assert sorted(os.listdir(job.folder / "one")) == ["mlartifacts", "mlflow.db", "run"]
    records = ["certificates.jsonl", "config.yaml", "environment.json", "metrics.jsonl", "reproduce.json"]
    folders = ["checkpoints", "evaluation", "export", "logs", "tracking"]
    assert sorted(os.listdir(job.broken)) == sorted([*records, *folders, "incarnation", "mlflow_run.json"])
