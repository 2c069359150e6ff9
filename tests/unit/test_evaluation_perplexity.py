"""The perplexity of a random Bloom of transformers, compared with a computation window by window."""

import math

import numpy as np
import pytest
import torch
import transformers

from configs.errors import InputError, TrainshortError
from configs.protocols import parse_protocol
from training.evaluation.perplexity import measure_loss

VOCAB = 50
NONOVERLAPPING = parse_protocol("nonoverlapping")


class BloomScorer:
    """Scores with transformers and records the shape of each batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = transformers.BloomConfig(
            vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5, use_cache=False
        )
        self.model = transformers.BloomForCausalLM(config).eval()
        self.batches: list[tuple[int, ...]] = []

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(tokens.shape))
        logits = self.model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.fixture(scope="module")
def bloom() -> BloomScorer:
    return BloomScorer()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=103, dtype=np.int64)


def by_hand(bloom: BloomScorer, tokens: np.ndarray, *, length: int, stride: int) -> tuple[float, int]:
    """Return loss and scored predictions, one window and one prediction at a time."""
    total, count, scored_until = 0.0, 0, 0
    for start in range(0, len(tokens) - length, stride):
        with torch.no_grad():
            window = torch.from_numpy(tokens[start : start + length])[None]
            log_probabilities = bloom.model(input_ids=window).logits[0].double().log_softmax(-1)
        chosen = log_probabilities.numpy()[range(length), tokens[start + 1 : start + length + 1]]
        for target, log_probability in enumerate(chosen, start=start + 1):
            if target > scored_until:
                total -= log_probability
                count, scored_until = count + 1, target
    return total / count, count


@pytest.mark.parametrize(
    ("length", "protocol", "stride"),
    [(16, "nonoverlapping", 16), (102, "nonoverlapping", 102), (16, "sliding:5", 5), (80, "sliding:1", 1)],
)
def test_perplexity_is_blooms_window_by_window(
    bloom: BloomScorer, tokens: np.ndarray, length: int, protocol: str, stride: int
) -> None:
    loss, count = by_hand(bloom, tokens, length=length, stride=stride)
    assert loss > 4
    for batch_tokens in (50, 8192):
        result = measure_loss(
            bloom, tokens, length=length, protocol=parse_protocol(protocol), batch_tokens=batch_tokens
        )
        assert result.tokens == count
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_batches_keep_to_their_tokens_and_progress_counts_them(tokens: np.ndarray) -> None:
    bloom = BloomScorer()
    seen: list[int] = []
    measure_loss(bloom, tokens, length=16, protocol=parse_protocol("sliding:4"), batch_tokens=100, progress=seen.append)
    assert {shape[1] for shape in bloom.batches} == {17}
    assert [shape[0] for shape in bloom.batches[:-1]] == [6] * (len(bloom.batches) - 1)
    assert seen == [shape[0] * 16 for shape in bloom.batches]
    assert sum(seen) == ((103 - 1 - 16) // 4 + 1) * 16


def test_read_only_tokens_are_accepted(bloom: BloomScorer, tokens: np.ndarray) -> None:
    frozen = tokens.copy()
    frozen.flags.writeable = False
    measure_loss(bloom, frozen, length=50, protocol=NONOVERLAPPING, batch_tokens=100)
    assert (frozen == tokens).all()


def test_losses_are_summed_in_double_precision() -> None:
    class Constant:
        def losses(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.full(tokens[:, 1:].shape, 0.1, dtype=torch.float32)

    tokens = np.zeros(2_000_001, dtype=np.int64)
    result = measure_loss(Constant(), tokens, length=100_000, protocol=NONOVERLAPPING, batch_tokens=8192)
    assert result.loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e6])
def test_loss_of_a_diverged_model_is_an_error(loss: float) -> None:
    class Broken:
        def losses(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.full(tokens[:, 1:].shape, loss)

    with pytest.raises(TrainshortError, match=r"loss at length 8 is (nan|inf|1000000)"):
        measure_loss(Broken(), np.zeros(20, dtype=np.int64), length=8, protocol=NONOVERLAPPING, batch_tokens=100)


def test_text_shorter_than_a_window_is_refused(bloom: BloomScorer) -> None:
    with pytest.raises(InputError, match="length 8 needs a text of 9 tokens, this one has 5"):
        measure_loss(bloom, np.zeros(5, dtype=np.int64), length=8, protocol=NONOVERLAPPING, batch_tokens=100)
