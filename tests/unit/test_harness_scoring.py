"""What `trainshort harness` computes, writes and refuses, without lm_eval: log-likelihoods, texts, reports."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import InputError, TrainshortError
from configs.positions import POSITIONS
from data_pipeline.tokenizer import load_tokenizer
from tests.support.command_line import Call, refused
from tests.support.models import VOCABULARY, make_wandering_decoder
from tests.support.spooled import attach_offline, begin_mlflow_run, spooled
from training.api import load
from training.generation import continue_tokens
from training.harness.record import keep_results
from training.harness.report import result_rows
from training.harness.scoring import PairScore, ScoredRow, TokenPair, cut_pair, plan_batches, score_pairs
from training.harness.stopping_text import continue_until, task_sampling
from training.model.cache import KeyValueCache
from training.model.single import SingleModel
from training.sampling import Sampling

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
CPU = torch.device("cpu")
LONGEST = 40


class Counted(SingleModel):
    """A model that counts the tokens that it computes."""

    computed = 0

    def score(self, tokens: Tensor, where: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]:
        self.computed += tokens[:, 1:].numel()
        return super().score(tokens, where, cache)

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        self.computed += tokens.numel()
        return super().next_logits(tokens, cache)


def some_pairs() -> list[TokenPair]:
    """Questions with several answers of one token and of more, one that is too long, and texts alone."""
    numbers = torch.randint(3, VOCABULARY, (900,), generator=torch.Generator().manual_seed(0)).tolist()

    def take(count: int) -> tuple[int, ...]:
        return tuple(numbers.pop() for _ in range(count))

    questions = [take(length) for length in (1, 20, 21, 9, 60)]
    pairs = [TokenPair(question, take(count)) for question in questions for count in (1, 1, 3, 7)]
    return [*pairs, TokenPair(take(1), take(40)), TokenPair(take(30), take(5)), TokenPair(take(2), take(1))]


def expected_score(model: SingleModel, pair: TokenPair) -> PairScore:
    """Return the score of a pair from the logits of its row alone."""
    tokens = torch.tensor([*pair.context, *pair.continuation][-(LONGEST + 1) :])
    count = len(pair.continuation)
    logits = model.logits(tokens[None, :-1])[0, -count:].double()
    chosen = logits.log_softmax(-1).gather(1, tokens[-count:, None])
    return PairScore(float(chosen.sum()), bool((logits.argmax(-1) == tokens[-count:]).all()))


@pytest.mark.parametrize("position", POSITIONS)
def test_scores_are_those_of_each_row_alone(position: str) -> None:
    model, pairs = SingleModel(make_wandering_decoder(position=position), device=CPU, certificate={}), some_pairs()
    greedy = [
        TokenPair(pair.context, tuple(islice(continue_tokens(model, pair.context, sampling=Sampling(), end=None), 3)))
        for pair in pairs[4:12]
    ]
    begun = [TokenPair(pair.context, (*pair.continuation[:-1], pair.continuation[-1] ^ 1)) for pair in greedy]
    pairs, done = [*pairs, *begun], list[int]()
    scores = score_pairs(model, [*pairs, *greedy], max_length=LONGEST, progress=done.append)
    expected = [expected_score(model, pair) for pair in (*pairs, *greedy)]
    assert [score.is_greedy for score in scores] == [score.is_greedy for score in expected]
    assert all(score.is_greedy for score in scores[len(pairs) :])
    assert not any(score.is_greedy for score in scores[: len(pairs)][-len(begun) :]), "all but the last token are"
    values = [score.log_likelihood for score in scores]
    assert values == pytest.approx([score.log_likelihood for score in expected], abs=1e-4)
    assert sum(done) == sum(min(len(pair.context) + len(pair.continuation), LONGEST + 1) for pair in (*pairs, *greedy))


def test_a_context_that_answers_share_is_computed_once() -> None:
    model = Counted(make_wandering_decoder(), device=CPU, certificate={})
    context = tuple(range(3, 33))
    score_pairs(model, [TokenPair(context, (answer, 9)) for answer in (4, 5, 6, 7)], max_length=LONGEST)
    assert model.computed == len(context) - 1 + 4 * 2, "the context's last token and the first of each answer"


@pytest.mark.parametrize(("alone", "sharing"), [(80, 200), (10_000, 10_000)])
def test_batches_hold_each_row_once_and_fit(alone: int, sharing: int) -> None:
    rows = [cut_pair(number, pair, max_length=LONGEST) for number, pair in enumerate(some_pairs() * 3)]
    batches = list(plan_batches(rows, batch_tokens=alone, cached_tokens=sharing))
    assert sorted(row.number for batch in batches for group in batch for row in group.rows) == list(range(len(rows)))
    for batch in batches:
        count = sum(len(group.rows) for group in batch)
        assert count == 1 or count * max(group.longest for group in batch) <= (sharing if batch[0].shared else alone)
        assert len({group.shared > 0 for group in batch}) == 1
        assert min(group.shared for group in batch) >= 0.75 * batch[0].shared
        for group in batch:
            assert len({row.tokens[: group.shared] for row in group.rows}) == 1


def test_a_long_context_loses_its_beginning() -> None:
    assert cut_pair(3, TokenPair((1, 2, 3, 4), (5, 6)), max_length=3) == ScoredRow(3, (3, 4, 5, 6), 2)
    assert cut_pair(0, TokenPair((1,), (5, 6)), max_length=3).tokens == (1, 5, 6)
    with pytest.raises(InputError, match="a continuation has 4 tokens, and 1 to 3 are possible"):
        cut_pair(0, TokenPair((1,), (5, 6, 7, 8)), max_length=3)


def test_diverged_weights_are_reported() -> None:
    decoder = make_wandering_decoder()
    with torch.no_grad():
        decoder.layers[-1].norm.weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
    model = SingleModel(decoder, device=CPU, certificate={})
    with pytest.raises(TrainshortError, match="a log-likelihood is not finite"):
        score_pairs(model, [TokenPair((3,), (4,))], max_length=LONGEST)


def test_a_text_ends_before_the_first_stop_string() -> None:
    tokenizer, model = load_tokenizer(OLD_RUN / "checkpoints" / "step_0000002" / "tokenizer.model"), load(OLD_RUN)
    whole = model.generate("Once", tokens=12, temperature=0).text.removeprefix("Once")

    class Told:
        """A model that says what the other one says."""

        def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
            self.ids = [*getattr(self, "ids", []), *tokens[0].tolist()]
            return model.logits(self.ids)[None, -1]

    def written(*stop: str, tokens: int = 12) -> str:
        return continue_until(
            Told(), tokenizer, model.encode("Once"), sampling=Sampling(), tokens=tokens, stop=list(stop)
        )

    assert len(whole) > 6
    assert written() == whole
    assert written("", "never there") == whole
    assert written(whole[3:5]) == whole.partition(whole[3:5])[0]
    assert written(whole[5], whole[2]) == whole[: min(whole.index(whole[5]), whole.index(whole[2]))]
    assert written(tokens=2) == model.decode(model.encode("Once" + whole)[: len(model.encode("Once")) + 2])[4:]


def test_a_task_says_how_tokens_are_drawn() -> None:
    assert task_sampling({"do_sample": False, "temperature": 0.0, "top_k": 5}, seed=3) == Sampling()
    assert task_sampling({"do_sample": True, "temperature": 0.0}, seed=3) == Sampling()
    assert task_sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, seed=3) == Sampling(0.7, 0.9, 3)
    assert task_sampling({"temperature": 0.7}, seed=3) == Sampling(0.7, 1.0, 3)
    with pytest.raises(InputError, match=r"draws with top_k, num_beams, and only do_sample, temperature, top_p are"):
        task_sampling({"do_sample": True, "temperature": 0.7, "top_k": 5, "num_beams": 2}, seed=3)


def measured(task: str, value: float, *, date: str, weights: str = "a", fewshot: int = 0) -> dict[str, Any]:
    """Return a report of one task, from what lm_eval's `evaluate` returns."""
    results = {
        "results": {task: {"name": task, "sample_len": 5, "acc,none": value, "acc_stderr,none": "N/A", "alias": task}},
        "higher_is_better": {task: {"acc": True}},
        "n-shot": {task: fewshot},
        "versions": {task: 2.0},
    }
    facts = {"limit": None, "max_length": 1024, "precision": "fp32", "date": date}
    return {
        "checkpoint": "runs/my/checkpoints/step_0000100",
        "step": 100,
        "train_length": 512,
        "weights_sha256": weights,
        "evaluations": [{"date": date, "command": f"trainshort {task}", "versions": {"torch": "2"}, "cut": 3}],
        "results": result_rows(results, **facts),
    }


def test_results_are_added_to_those_that_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "harness").mkdir()
    keep_results(measured("piqa", 0.5, date="D1"), tmp_path)
    keep_results(measured("piqa", 0.25, date="D2", fewshot=5), tmp_path)
    table = keep_results(measured("piqa", float("inf"), date="D3"), tmp_path)
    kept = json.loads((tmp_path / "harness" / "results.json").read_text())
    shown = [(row["fewshot"], row["value"], row["stderr"], row["date"]) for row in kept["results"]]
    assert shown == [(0, None, None, "D3"), (5, 0.25, None, "D2")]
    assert [made["date"] for made in kept["evaluations"]] == ["D2", "D3"]
    text = table.read_text()
    assert "| `piqa` | 2.0 | acc ↑ | 0.2500 | - | 5 | 5 | 1,024 | fp32 | D2 |" in text
    assert "- evaluated D3 by torch 2; 3 contexts were cut: `trainshort piqa`" in text
    assert not caplog.records
    keep_results(measured("piqa", 0.75, date="D4", weights="b"), tmp_path)
    assert [row["date"] for row in json.loads(table.with_suffix(".json").read_text())["results"]] == ["D4"]
    assert "is now results.until-D4.json" in caplog.text
    assert json.loads((table.parent / "results.until-D4.json").read_text()) == kept


def test_tasks_without_a_number_are_refused() -> None:
    results = {"results": {"essay": {"alias": "essay", "verdict,none": "good"}, "poem": {"alias": "poem"}}}
    with pytest.raises(InputError, match="essay, poem gave no number, so there is nothing to keep"):
        result_rows(results, precision="fp32")


def test_results_go_to_mlflow_under_names_of_their_own(tmp_path: Path) -> None:
    run_dir, folder = tmp_path, tmp_path / "evaluation" / "step_0000100"
    begin_mlflow_run(run_dir)
    ways: tuple[dict[str, object], ...] = ({}, {"fewshot": 5}, {"limit": 10}, {"precision": "bf16"}, {"filter": "a:b"})
    for number, change in enumerate((*ways, {"max_length": 2048})):
        report = measured("piqa", number / 10, date=f"D{number}")
        usual = {"stderr": 0.01, "max_length": report["train_length"]}
        report["results"] = [{**row, **usual, **change} for row in report["results"]]
        keep_results(report, folder, tracker=attach_offline(run_dir), began_ms=7)
    metrics, nested, tables = (spooled(run_dir, kind=kind) for kind in ("metrics", "nested", "table"))
    names = ("piqa/acc", "piqa-5-shot/acc", "piqa-limit-10/acc", "piqa-bf16/acc", "piqa/acc-a_b")
    names += ("piqa-max-length-2048/acc",)
    assert [(event["step"], event["values"]) for event in metrics] == [
        (100, {f"harness/{name}": number / 10, f"harness/{name}_stderr": 0.01}) for number, name in enumerate(names)
    ]
    assert nested[0]["points"][0][:2] == ["piqa/acc", 0.0]
    assert (nested[0]["name"], nested[0]["began_ms"], nested[0]["status"]) == ("harness step_0000100", 7, "FINISHED")
    assert nested[0]["params"]["tasks"] == '["piqa"]'
    assert {event["artifact"] for event in tables} == {"harness.json"}
    columns, rows = tables[-1]["table"]["columns"], tables[-1]["table"]["data"]
    assert {row[columns.index("value")] for row in rows} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert {row[columns.index("version")] for row in rows} == {2.0}
    files = {(event["folder"], Path(event["path"]).name) for event in spooled(run_dir, kind="artifact")}
    assert files == {("evaluation/step_0000100/harness", name) for name in ("results.json", "results.md")}


def test_without_the_harness_one_line_says_what_to_install(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.harness.tasks.find_spec", lambda _: None)
    answer = trainshort("harness", str(OLD_RUN), "--tasks", "piqa")
    assert (answer.code, answer.out) == (3, "")
    assert answer.error == (
        "error: EleutherAI's lm-evaluation-harness (lm_eval) is not installed: run pip install 'trainshort[harness]'\n"
    )


@pytest.mark.usefixtures("folder")
def test_wrong_options_of_harness_are_refused(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.harness.tasks.find_spec", lambda _: "there")
    tasks = ("--tasks", "piqa")
    assert refused(trainshort, "harness", "nowhere", *tasks).startswith("checkpoint nowhere does not exist")
    assert refused(trainshort, "harness", "run", "--tasks", " ,").startswith("--tasks must name tasks, got none")
    assert refused(trainshort, "harness", "run", *tasks, "--fewshot", "-1").startswith("--fewshot must be 0 or more")
    assert refused(trainshort, "harness", "run", *tasks, "--limit", "0").startswith("--limit must be a whole number")
    assert refused(trainshort, "harness", "run", *tasks, "--precision", "fp8").startswith("precision")
