"""The perplexity of a random Bloom of transformers, compared with a computation token by token."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from configs.errors import InputError, TrainshortError
from configs.protocols import parse_protocol
from tests.support.evaluation import measure
from training.evaluation.positions import bin_ends
from training.evaluation.resampling import drawn_losses, units_of
from training.evaluation.sums import LossSums
from training.evaluation.windows import place_windows, same_tokens

VOCAB = 50


class BloomScorer:
    """Scores with transformers and records the shape of each batch and the predictions that were asked for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = transformers.BloomConfig(
            vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5, use_cache=False
        )
        self.model = transformers.BloomForCausalLM(config).eval()
        self.batches: list[tuple[int, ...]] = []
        self.asked: list[int | None] = []

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        self.batches.append(tuple(tokens.shape))
        self.asked.append(last)
        logits = self.model(input_ids=tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses if last is None else losses[:, -last:]


@pytest.fixture(scope="module")
def bloom() -> BloomScorer:
    return BloomScorer()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=103, dtype=np.int64)


def loss_of(bloom: BloomScorer, tokens: np.ndarray, *, token: int, start: int) -> float:
    """Return the loss of one token after the tokens from `start` on, and nothing else."""
    with torch.no_grad():
        logits = bloom.model(input_ids=torch.from_numpy(tokens[start:token])[None]).logits[0, -1]
    return -float(logits.double().log_softmax(-1)[tokens[token]])


def contexts(kind: str, number: int, *, length: int, tokens: int) -> dict[int, int]:
    """Return the first input of each scored token, by the definition of a protocol."""
    seen: dict[int, int] = {}
    for start in range(0, tokens - length, number if kind == "sliding" else length):
        for place in range(length):
            is_scored = kind == "nonoverlapping" or place >= length - number or (kind == "sliding" and start == 0)
            if is_scored:
                seen[start + place + 1] = start
    return seen


@pytest.mark.parametrize(
    ("length", "protocol"),
    [(16, "nonoverlapping"), (102, "nonoverlapping"), (16, "sliding:5"), (80, "sliding:1"), (16, "last:3")],
)
def test_each_token_is_scored_with_its_context(
    bloom: BloomScorer, tokens: np.ndarray, length: int, protocol: str
) -> None:
    kind, _, number = protocol.partition(":")
    seen = contexts(kind, int(number or length), length=length, tokens=len(tokens))
    each = {token: loss_of(bloom, tokens, token=token, start=start) for token, start in seen.items()}
    loss = sum(each.values()) / len(each)
    assert loss > 4
    for batch_tokens in (50, 8192):
        result = measure(bloom, tokens, length=length, protocol=protocol, batch_tokens=batch_tokens)
        assert result.tokens == len(each)
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    by_place: dict[int, list[float]] = {}
    for token, value in each.items():
        by_place.setdefault(token - seen[token], []).append(value)
    bins = [*bin_ends(length)]
    expected: dict[int, list[float]] = {}
    for place, values in by_place.items():
        if len(values) > 1 or len(by_place) == len(each):
            expected.setdefault(min(end for end in bins if end >= place), []).extend(values)
    shown = result.by_position
    assert shown is not None
    assert shown.losses == pytest.approx([np.mean(expected[end]) for end in sorted(expected)], rel=1e-5)
    assert shown.tokens == tuple(len(expected[end]) for end in sorted(expected))


def test_a_sweep_on_same_tokens_is_their_loss_alone(bloom: BloomScorer, tokens: np.ndarray) -> None:
    lengths, text = (16, 30), tokens[:97]
    for protocol in (parse_protocol("nonoverlapping"), parse_protocol("last:4")):
        same, units = same_tokens(97, lengths=lengths, protocols=[protocol]), units_of(None, tokens=97)
        scored = []
        for length in lengths:
            windows = place_windows(97, length=length, protocol=protocol, same=same)
            sums = LossSums(windows, units)
            for batch in windows.batches(most=3):
                views = np.stack([text[start : start + length + 1] for start in windows.starts[batch]])
                sums.add(bloom.losses(torch.from_numpy(views)).detach(), batch=batch)
            scored.append(np.flatnonzero(windows.scored_in(np.arange(97))).tolist())
            if protocol.last is None:
                starts = {token: (token - 1) // length * length for token in scored[-1]}
            else:  # the windows of both end where those of the longest do
                starts = {token: math.ceil(token / 30) * 30 - length for token in scored[-1]}
            expected = [loss_of(bloom, text, token=token, start=start) for token, start in starts.items()]
            assert sums.totals().by_unit.sum() == pytest.approx(sum(expected), rel=1e-6)
        assert scored[0] == scored[1]
        assert len(scored[0]) == (90 if protocol.last is None else 12)


def test_sums_go_on_from_where_they_were(bloom: BloomScorer, tokens: np.ndarray) -> None:
    windows = place_windows(103, length=16, protocol=parse_protocol("sliding:2"))
    units = units_of(np.arange(0, 103, 3), tokens=103)
    assert (units.kind, units.count) == ("document", 35)
    whole, first, second = (LossSums(windows, units) for _ in range(3))
    views = np.lib.stride_tricks.sliding_window_view(tokens, 17)
    for number, batch in enumerate(windows.batches(most=5)):
        with torch.no_grad():
            losses = bloom.losses(torch.from_numpy(views[windows.starts[batch]]))
        whole.add(losses, batch=batch)
        if number == 3:
            second.restore(first.to_arrays())
        (first if number < 3 else second).add(losses, batch=batch)
    assert first.done < second.done == whole.done == windows.count
    assert second.totals().by_unit.tolist() == whole.totals().by_unit.tolist()
    assert second.totals().by_position.tolist() == whole.totals().by_position.tolist()


def test_the_standard_error_is_that_of_the_documents_mean() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(20, 60, size=400)
    sums = counts * (3 + rng.normal(0, 0.5, 400))  # a document is hard or easy as a whole
    draws = drawn_losses(sums, counts)
    mean = sums.sum() / counts.sum()
    residuals = (sums - mean * counts) / counts.mean()  # of a ratio of two sums
    assert draws.std(ddof=1) == pytest.approx(residuals.std() / 20, rel=0.1)
    assert draws.mean() == pytest.approx(mean, abs=0.01)
    harder = drawn_losses(sums + 0.2 * counts, counts)
    assert (harder - draws).tolist() == pytest.approx([0.2] * len(draws)), "measurements draw the same documents"
    assert (drawn_losses(sums, counts) == draws).all()


def test_units_are_documents_or_blocks_of_equal_length() -> None:
    few = units_of(np.array([0, 10]), tokens=1000)
    assert (few.kind, few.count, few.starts[:3].tolist()) == ("block", 50, [0, 20, 40])
    assert few.of(np.array([[0, 19], [20, 999]])).tolist() == [[0, 0], [1, 49]]
    assert units_of(None, tokens=3).starts.tolist() == [0, 1, 2]
    # where one window scores one block alone, draws without it say no more than the text
    lonely = drawn_losses(np.array([0.0, 6.0, 0.0]), np.array([0, 3, 0]))
    assert set(lonely.tolist()) == {2.0}


def test_no_batch_is_larger_and_only_scored_tokens_are_asked_for(tokens: np.ndarray) -> None:
    bloom = BloomScorer()
    seen: list[int] = []
    measure(bloom, tokens, length=16, protocol="sliding:4", batch_tokens=100, progress=seen.append)
    assert {shape[1] for shape in bloom.batches} == {17}
    assert [shape[0] for shape in bloom.batches] == [1, 6, 6, 6, 3]
    assert bloom.asked == [16, 4, 4, 4, 4]
    assert seen == [shape[0] * 16 for shape in bloom.batches]
    assert sum(seen) == ((103 - 1 - 16) // 4 + 1) * 16


def test_read_only_tokens_are_accepted(bloom: BloomScorer, tokens: np.ndarray) -> None:
    frozen = tokens.copy()
    frozen.flags.writeable = False
    measure(bloom, frozen, length=50, protocol="nonoverlapping", batch_tokens=100)
    assert (frozen == tokens).all()


class Constant:
    """A model for which every token has one loss."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        return torch.full((len(tokens), last or tokens.shape[1] - 1), self.loss, dtype=torch.float32)


def test_losses_are_summed_in_double_precision() -> None:
    result = measure(Constant(0.1), np.zeros(2_000_001, dtype=np.int64), length=100_000, protocol="nonoverlapping")
    assert result.loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)
    assert result.standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e6])
def test_loss_of_a_diverged_model_is_an_error(loss: float) -> None:
    with pytest.raises(TrainshortError, match=r"loss at length 8 is (nan|inf|1000000)"):
        measure(Constant(loss), np.zeros(20, dtype=np.int64), length=8, protocol="nonoverlapping")


def test_text_shorter_than_a_window_is_refused(bloom: Any) -> None:
    with pytest.raises(InputError, match="length 8 needs a text of 9 tokens, this one has 5"):
        measure(bloom, np.zeros(5, dtype=np.int64), length=8, protocol="nonoverlapping")
