"""What the trained model computes, to compare an export with: the model itself is freed before the other is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import InputError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from training.checkpoint.read import Checkpoint
from training.evaluation.text import held_out_text
from training.export.formats.table import ExportFormat
from training.export.parity import Continuation, Rounding, measure_rounding
from training.generation import LanguageModel, continue_tokens
from training.model.single import load_single
from training.sampling import Sampling

# A greedy continuation is compared over at most this many tokens, after a prompt of at most this many.
CONTINUED_TOKENS = 32
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class TrainedOutputs:
    """What the trained model computes, its weights rounded as the export's are.

    Attributes:
        tokens: Token ids of the text, [tokens] int64.
        text: The text, if it is held-out text; None if the tokens are random.
        logits: Logits of the first tokens, [1, length, vocab] fp32 for each length to compare.
        rounding: What rounding the weights changed at the first length; None if nothing.
        continuation: Greedy continuation of the text's beginning.
        certificate: Certificate of the model's positions, as plain values.
    """

    tokens: Tensor
    text: str | None
    logits: tuple[Tensor, ...]
    rounding: Rounding | None
    continuation: Continuation
    certificate: dict[str, Any]


def compute_trained(checkpoint: Checkpoint, exporter: ExportFormat, *, lengths: Sequence[int]) -> TrainedOutputs:
    """Load the trained model and return what it computes; nothing keeps the model.

    Args:
        checkpoint: The checkpoint.
        exporter: The format, which rounds the weights.
        lengths: Lengths to compare, the shortest first.
    Raises:
        InputError: a weight is out of the range of the export's type.
        TrainshortError: its positions are wrong, or a logit is not finite.
    """
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    held_out = _held_out_tokens(checkpoint, count=lengths[-1])
    tokens = _random_tokens(checkpoint, count=lengths[-1]) if held_out is None else held_out
    model = load_single(checkpoint)
    first = tokens[None, : lengths[0]]
    before = model.logits(first)
    model.change_weights(partial(exporter.rounded, model=checkpoint.config.model))
    logits = tuple(model.logits(tokens[None, :length]) for length in lengths)
    return TrainedOutputs(
        tokens=tokens,
        text=None if held_out is None else tokenizer.decode(held_out.tolist()),
        logits=logits,
        rounding=measure_rounding(before, logits[0]),
        continuation=_continuation(model, tokenizer, tokens),
        certificate=model.certificate,
    )


class _Kept:
    """A model whose logits of each new token are kept."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.logits: list[Tensor] = []

    def next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        logits = self._model.next_logits(tokens, cache)  # [1, vocab]
        self.logits.append(logits[0])
        return logits


def _continuation(model: LanguageModel, tokenizer: Tokenizer, tokens: Tensor) -> Continuation:
    """Return the greedy continuation of the text's beginning; both together are shorter than the shortest length."""
    eighth = max(1, len(tokens) // 8)
    # As text, which a server takes: encoded again it may be other tokens, where it was cut.
    prompt = tokenizer.decode(tokens[: min(PROMPT_TOKENS, eighth)].tolist())
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    kept, end = _Kept(model), tokenizer.end_of_document
    continued = tuple(islice(continue_tokens(kept, ids, sampling=Sampling(), end=end), min(CONTINUED_TOKENS, eighth)))
    return Continuation(prompt, tuple(ids), continued, torch.stack(kept.logits).cpu())


def _held_out_tokens(checkpoint: Checkpoint, *, count: int) -> Tensor | None:
    """Return the first held-out tokens, [count] int64, or None if there are fewer or the data is missing."""
    try:
        tokens = held_out_text(checkpoint).tokens[:count]
    except InputError:
        # The data may be on another machine. Random tokens compare the logits just as well.
        return None
    return torch.from_numpy(tokens.astype(np.int64)) if len(tokens) == count else None


def _random_tokens(checkpoint: Checkpoint, *, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(checkpoint.vocab_size, size=count))
