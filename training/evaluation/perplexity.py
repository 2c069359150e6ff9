"""Perplexity of a text at one length."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol as TypingProtocol

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import TrainshortError
from training.evaluation.windows import WindowProtocol, Windows, place_windows

BATCH_TOKENS = 8192


class Scorer(TypingProtocol):
    """What evaluation asks of a model."""

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihoods of tokens[:, 1:] in nats.

        Args:
            tokens: [batch, length + 1], int64; any length.
        Returns:
            [batch, length], fp32.
        """
        ...


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        length: Tokens of a window.
        protocol: How the window moved.
        tokens: Predictions scored, each once.
        loss: Their mean negative log-likelihood, in nats.
    """

    length: int
    protocol: WindowProtocol
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)


def measure_loss(
    scorer: Scorer,
    tokens: npt.NDArray[np.int64],
    *,
    length: int,
    protocol: WindowProtocol,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Return the mean loss over a text cut into windows.

    Args:
        scorer: The model.
        tokens: The text, [tokens], int64.
        length: Inputs of a window.
        protocol: How the window moves.
        batch_tokens: Inputs of one pass through the model; at least one window goes through.
        progress: Called after each pass with the inputs it had, that is windows x length.
    Raises:
        InputError: the text is shorter than a window, or the protocol does not fit the length.
        TrainshortError: the loss is not a number.
    """
    windows = place_windows(len(tokens), length=length, protocol=protocol)
    views = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    batch = max(1, batch_tokens // length)
    total = 0.0
    with torch.no_grad():
        for first in range(0, windows.count, batch):
            starts = windows.starts(first, first + batch)
            losses = scorer.losses(torch.from_numpy(views[starts]))
            total += _sum_scored(losses, windows=windows, first=first)
            if progress is not None:
                progress(len(starts) * length)
    loss = total / windows.scored
    if not loss < math.log(1e300):  # nan too; beyond it perplexity is no number either
        raise TrainshortError(
            f"the loss at length {length} is {loss}: the checkpoint's weights have diverged, take an earlier one"
        )
    return Result(length=length, protocol=protocol, tokens=windows.scored, loss=loss)


def _sum_scored(losses: torch.Tensor, *, windows: Windows, first: int) -> float:
    """Return the sum, in fp64, of what windows `first`, `first + 1`, ... score; losses are [batch, length]."""
    exact = losses.to("cpu", torch.float64)
    total = exact[:, windows.first_scored(first + 1) :].sum()
    if first == 0:
        # the text's first window scores its early predictions too
        total += exact[0, : windows.first_scored(1)].sum()
    return float(total)
