"""Tasks of EleutherAI's lm-evaluation-harness on a checkpoint: `make test-harness`, which installs it.

Its own `hf` model, on the exported folder, must give the same numbers.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.schema import Model
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.vocabulary import read_vocabulary
from tests.support.command_line import Call
from tests.support.exports import random_weights, train_sentencepiece, write_export
from tests.support.spooled import attach_offline, begin_mlflow_run, spooled
from training.export.formats.huggingface import HuggingFaceFormat
from training.model.single import load_single

pytestmark = [pytest.mark.harness, pytest.mark.filterwarnings("default")]
TASKS = Path(__file__).parent / "tasks"
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
NAMES = ("house_choices", "house_words", "house_texts", "house_written")
SHAPE = Model(layers=2, hidden=48, heads=6)
LONGEST = 96


@pytest.fixture(autouse=True)
def _tasks_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the folder of the tasks, whose data files are named from there; nothing is asked of the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(TASKS)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same random weights as our model of the harness, and exported as its own `hf` model."""
    from lm_eval.api.registry import get_model

    from training.harness.language_model import CheckpointLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_sentencepiece(folder)
    vocab_size = len(read_vocabulary(tokenizer))
    weights = random_weights(SHAPE, vocab_size=vocab_size)
    exported = folder / "exported"
    exported.mkdir()
    write_export(HuggingFaceFormat("fp32"), exported, weights=weights, model=SHAPE, tokenizer=tokenizer)
    checkpoint: Any = SimpleNamespace(
        config=SimpleNamespace(model=SHAPE, data=SimpleNamespace(mask_documents=False)),
        vocab_size=vocab_size,
        slice=lambda shard, *, kind, part: weights[shard.name].clone(),
    )
    loaded = load_tokenizer(tokenizer)
    ours = CheckpointLM(load_single(checkpoint), loaded, max_length=LONGEST, seed=1)
    theirs = hugging_face_model(exported, max_length=LONGEST, start=loaded.end_of_document)
    assert isinstance(theirs, get_model("hf"))
    return ours, theirs


def hugging_face_model(folder: Path, *, max_length: int, start: int) -> Any:
    """Return the harness's own model of an exported folder, with the start of a text that training has."""
    from lm_eval.api.registry import get_model

    return get_model("hf")(
        pretrained=str(folder),
        device="cpu",
        dtype="float32",
        batch_size=3,
        max_length=max_length,
        prefix_token_id=start,
    )


def measured(model: Any, *, fewshot: int | None = None) -> Any:
    """Return what the harness measures with a model, with each answer."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    return simple_evaluate(model, tasks=list(NAMES), task_manager=manager, num_fewshot=fewshot, bootstrap_iters=100)


def answers(result: Any, task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in result["samples"][task]]


@pytest.mark.parametrize("fewshot", [None, 3])
def test_the_exported_folder_gives_the_same_numbers(models: tuple[Any, Any], fewshot: int | None) -> None:
    ours, theirs = (measured(model, fewshot=fewshot) for model in models)
    for task in ("house_choices", "house_words"):
        for one, other in zip(answers(ours, task), answers(theirs, task), strict=True):
            assert [best for _, best in one] == [best for _, best in other]
            assert [value for value, _ in one] == pytest.approx([value for value, _ in other], abs=1e-4)
    assert answers(ours, "house_written") == answers(theirs, "house_written")
    assert any(text for (text,) in answers(ours, "house_written"))
    totals = [[value for (value,) in answers(result, "house_texts")] for result in (ours, theirs)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4, rel=1e-6)
    for task in NAMES:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert math.isfinite(value)
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), name


def test_long_contexts_and_empty_ones_are_those_of_hf(models: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    # Not one that repeats itself: hf takes equal windows for one, also where they score another number of tokens.
    long = " ".join(f"{number} dog {number**2 % 37} fox" for number in range(120))
    pairs = [("", "The dog"), (long, " the dog"), (long, " a fox and"), ("The dog  ", "sleeps"), ("x", "y")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    before = models[0].cut
    ours, theirs = (model.loglikelihood(requests) for model in models)
    assert models[0].cut == before + 2
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (long, "a", "")]
    ours, theirs = (model.loglikelihood_rolling(texts) for model in models)
    assert ours == pytest.approx(theirs, rel=1e-5)
    asked = [Instance("generate_until", {}, (long, {"until": ["q"], "max_gen_toks": 20}), 0)]
    ours, theirs = (model.generate_until(asked) for model in models)
    assert ours == theirs


def test_drawn_texts_differ_and_repeat(models: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    settings = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    asked = [Instance("generate_until", {}, ("The dog", settings), 0)] * 4
    texts = models[0].generate_until(asked)
    assert len(set(texts)) == 4
    assert models[0].generate_until(asked) == texts


def test_one_command_keeps_results_and_adds_to_them(
    trainshort: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(OLD_RUN, run)
    begin_mlflow_run(run)
    monkeypatch.setattr("training.tracking.tracker.attach", attach_offline)
    words = ("harness", str(run), "--tasks", ",".join(NAMES), "--task-dir", ".")
    answer = trainshort(*words, "--max-length", str(LONGEST), "--json")
    assert answer.code == 0, answer.error
    report = json.loads(answer.out)
    kept = run / "evaluation" / "step_0000002" / "harness"
    assert json.loads((kept / "results.json").read_text()) == report
    assert trainshort("export", str(run), "--format", "hf", "--out", str(exported)).code == 0
    theirs = measured(hugging_face_model(exported, max_length=LONGEST, start=2))
    for row in report["results"]:
        expected = theirs["results"][row["task"]][f"{row['metric']},{row['filter']}"]
        assert row["value"] == pytest.approx(expected, rel=1e-4), row
        assert row["version"] == theirs["versions"][row["task"]]
    [metrics] = spooled(run, kind="metrics")
    way = f"max-length-{LONGEST}"  # not the training length
    values = {f"harness/{row['task']}-{way}/{row['metric']}": row["value"] for row in report["results"]}
    assert {name: metrics["values"][name] for name in values} == values
    assert {row["task"] for row in report["results"]} == set(NAMES)
    shown = trainshort(
        "harness", str(run), "--tasks", "house_choices", "--task-dir", ".", "--limit", "2", "--max-length", "20"
    )
    assert shown.code == 0, shown.error
    assert "contexts are longer than 20 tokens and were cut at their beginning" in shown.error
    assert "inputs of up to 20" in shown.out
    both = json.loads((kept / "results.json").read_text())
    assert len(both["results"]) == len(report["results"]) + 2
    assert len(both["evaluations"]) == len({row["date"] for row in both["results"]})
    below = [event["name"] for event in spooled(run, kind="nested")]
    assert below == ["harness step_0000002", "export step_0000002, hf", "harness step_0000002"]
    assert " | acc_norm ↑ |" in (kept / "results.md").read_text()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("house_absent", "HF_HUB_OFFLINE=0 lets tasks download theirs"),
        ("hous_words", "which is not a task: did you mean house_words"),
        ("house_broken", "cannot be loaded"),
    ],
)
def test_a_task_that_cannot_run_is_one_line(trainshort: Call, tmp_path: Path, task: str, words: str) -> None:
    broken = (TASKS / "texts.yaml").read_text().replace("house_texts", "house_broken").replace("_rolling", "_rollin")
    shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / "broken.yaml").write_text(broken)
    shutil.copytree(OLD_RUN, tmp_path / "run")
    answer = trainshort("harness", str(tmp_path / "run"), "--tasks", task, "--task-dir", str(tmp_path / "tasks"))
    errors = [line for line in answer.error.splitlines() if line.startswith("error: ")]
    assert answer.code == 2, answer
    assert len(errors) == 1
    assert words in errors[0]
    assert answer.out == ""
    assert not (tmp_path / "run" / "evaluation").exists()


def test_texts_that_leave_no_room_name_the_option(trainshort: Call, tmp_path: Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    answer = trainshort("harness", str(tmp_path / "run"), "--tasks", "house_written", "--task-dir", ".")
    assert answer.code == 2
    assert "leave no room for its prompt in 8: use --max-length 48" in answer.error
