"""What `retrieval` says of models whose recall is known, and that it computes what one pass over a text computes."""

import math
from pydoc_data.topics import topics
from statistics import fmean

import numpy as np
import pytest
import torch

from configs.errors import TrainshortError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.support.evaluation import TOKENIZER
from tests.support.recall_models import KnowsNothing, ReadingModel
from training.checkpoint.read import open_checkpoint
from training.generation import continue_tokens
from training.model.cache import KeyValueCache
from training.model.single import SingleModel, load_single
from training.retrieval.cells import RetrievalCell
from training.retrieval.prompts import Prompt, PromptMaker, make_haystack
from training.retrieval.request import RetrievalRequest
from training.retrieval.run import ask, plan_retrieval
from training.retrieval.scoring import CHANCE, RetrievalModel, score_prompts
from training.retrieval.shares import wilson_interval
from training.retrieval.tasks import TASKS
from training.sampling import Sampling

TEXT = "\n".join(topics.values())[:60_000]
LENGTHS = (400, 450)
OLD_RUN = TOKENIZER.parents[1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> PromptMaker:
    haystack = make_haystack(np.array(tokenizer.encode(TEXT)), tokenizer, longest=2000)
    return PromptMaker(haystack, tokenizer, seed=1)


def cells_of(model: RetrievalModel, maker: PromptMaker, tokenizer: Tokenizer) -> list[RetrievalCell]:
    """Return what is measured of a model at two depths, and the needles' places at random."""
    parts = plan_retrieval(RetrievalRequest(depths=2, samples=1), maker, lengths=LENGTHS)
    cells: list[RetrievalCell] = []
    ask(model, maker, tokenizer, parts, cells=cells)
    assert len(cells) == len(LENGTHS) * (3 * 2 + 2)
    return cells


def test_a_model_that_reads_everything_scores_one(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    for cell in cells_of(ReadingModel(tokenizer), maker, tokenizer):
        result = cell.to_json()
        assert (result["recall"], result["choice"]) == (1, 1), result
        assert result["log_probability"] == pytest.approx(0, abs=1e-4)
        assert result["margin"] > 5
        assert result["recall_interval"][1] == 1


def test_a_model_that_knows_nothing_scores_as_by_chance(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    for cell in cells_of(KnowsNothing(tokenizer), maker, tokenizer):
        result = cell.to_json()
        assert result["recall"] == 0
        assert (result["choice"], result["margin"]) == pytest.approx((CHANCE, 0))
    prompt = maker.make(TASKS["single"], length=500, depth=0.0, number=0)
    (score,) = score_prompts(KnowsNothing(tokenizer), [prompt], tokenizer)
    width = prompt.candidates[0].shape[1]
    assert score.log_probability == pytest.approx(-width * math.log(tokenizer.vocab_size))


def test_a_model_with_a_window_scores_within_it(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    window, length = 300, 600
    model, seen = ReadingModel(tokenizer, sees=window), []
    for task in ("passkey", "single", "multi-key"):
        for depth in np.linspace(0, 1, 6):
            prompt = maker.make(TASKS[task], length=length, depth=depth, number=0)
            (score,) = score_prompts(model, [prompt], tokenizer)
            # seen at the first token of the answer, and at the last
            first, last = len(prompt.tokens) - window, length - 1 - window
            if prompt.starts[0] >= last:
                seen.append(True)
                assert (score.recall, score.choice) == (1, 1)
            elif prompt.starts[0] < first:
                seen.append(False)
                assert score.recall == 0
                assert score.choice == pytest.approx(CHANCE)
    assert seen.count(True) >= 6
    assert seen.count(False) >= 6


def test_half_of_several_numbers_is_half_a_score(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    prompt = maker.make(TASKS["multi-query"], length=600, depth=None, number=0)
    early = sorted(prompt.starts)[1]
    # reads the last two needles: sees from behind the second one on
    (score,) = score_prompts(ReadingModel(tokenizer, sees=600 - early - 40), [prompt], tokenizer)
    assert (score.recall, score.choice) == (0.5, 0.5)


def real_model() -> SingleModel:
    return load_single(open_checkpoint(OLD_RUN))


def log_probability(model: SingleModel, prompt: Prompt, answer: list[int], *, width: int) -> float:
    """Return that of the last tokens of an answer, by one pass over prompt and answer."""
    ids = torch.tensor([[*prompt.tokens.tolist(), *answer]])
    return -float(model.losses(ids)[0, -width:].double().sum())


@pytest.mark.parametrize("task", ["single", "multi-value"])
def test_scores_are_those_of_one_pass_over_the_text(
    task: str, maker: PromptMaker, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = real_model()
    depth = None if TASKS[task].is_spread else 0.5
    prompts = [maker.make(TASKS[task], length=400, depth=depth, number=number) for number in range(2)]
    scores = score_prompts(model, prompts, tokenizer)
    for prompt, score in list(zip(prompts, scores, strict=True))[task == "multi-value" :]:
        before, rights, margins, firsts = list[int](), [], [], []
        for candidates in prompt.candidates:
            likely = [log_probability(model, prompt, [*before, *each], width=len(each)) for each in candidates.tolist()]
            rights.append(likely[0])
            margins.append(likely[0] - fmean(likely[1:]))
            firsts.append(likely[0] == max(likely))
            before += candidates[0].tolist()
        assert score.log_probability == pytest.approx(fmean(rights), abs=1e-4)
        assert score.margin == pytest.approx(fmean(margins), abs=1e-4)
        assert score.choice == fmean(firsts)
        stream = continue_tokens(model, prompt.tokens.tolist(), sampling=Sampling(), end=None)
        assert score.generated == tokenizer.decode([next(stream) for _ in range(prompt.answer_tokens)])
    monkeypatch.setattr("training.retrieval.scoring.PREFILL_TOKENS", 128)
    for whole, parted in zip(scores, score_prompts(model, prompts, tokenizer), strict=True):
        assert parted.log_probability == pytest.approx(whole.log_probability, abs=1e-4)
        assert parted.generated == whole.generated


def test_a_prompt_is_read_in_parts_and_few_at_a_time(
    maker: PromptMaker, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("training.retrieval.scoring",):
        monkeypatch.setattr(f"{module}.PREFILL_TOKENS", 1100)
    model = KnowsNothing(tokenizer)
    request = RetrievalRequest(tasks=["passkey"], depths=2, samples=2)
    for lengths in ((500,), (1500,)):
        model.largest = 0
        cells: list[RetrievalCell] = []
        ask(model, maker, tokenizer, plan_retrieval(request, maker, lengths=lengths), cells=cells)
        assert [len(cell.scores) for cell in cells] == [2, 2]
        assert 700 < model.largest <= 1100


def test_weights_that_diverged_are_named(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    prompt = maker.make(TASKS["single"], length=500, depth=0.0, number=0)
    with pytest.raises(TrainshortError, match="logits are not finite: its weights have diverged"):
        score_prompts(KnowsNothing(tokenizer, logit=math.nan), [prompt], tokenizer)


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert wilson_interval(81 / 263, trials=263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, trials=20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, trials=20) == pytest.approx((0.8389, 1), abs=5e-5)


def test_a_cache_forgets_what_is_cut_off() -> None:
    model, cache, short = real_model(), KeyValueCache(), KeyValueCache()
    tokens = torch.arange(60)[None]
    expected = model.next_logits(tokens[:, :41], short)
    model.next_logits(tokens[:, :40], cache)
    model.logits(tokens[:, 45:60], cache)
    cache.cut(40)
    torch.testing.assert_close(model.next_logits(tokens[:, 40:41], cache), expected, rtol=1e-5, atol=1e-5)
