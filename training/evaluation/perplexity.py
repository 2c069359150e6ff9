"""Measure the perplexity of a text at one length."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import TrainshortError
from configs.protocols import WindowProtocol
from training.evaluation.windows import Windows, place_windows
from training.model.windows import LosslessWindows

# exp overflows fp64 above this loss, so there is no perplexity to report
_HIGHEST_LOSS = math.log(1e300)


class Scorer(Protocol):
    """A model that evaluation can run.

    Attributes:
        batch_tokens: Inputs of one pass that use its device well.
    """

    @property
    def batch_tokens(self) -> int: ...

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihood of each predicted token, perhaps before it is computed.

        Args:
            tokens: [batch, length + 1] int64, of any length.
        Returns:
            Of tokens[:, 1:], in nats, [batch, length] fp32, on any device.
        """
        ...


@dataclass(frozen=True)
class PerplexityResult:
    """The loss of a text at one length, under one protocol.

    Attributes:
        length: Inputs of a window, in tokens.
        protocol: How the window moved.
        tokens: Predictions scored, each once.
        loss: Mean negative log-likelihood of the scored predictions, in nats.
        density_by_layer: Share of the causal scores that each block's attention computed, mean over heads and windows;
            empty if its kernel does not count them.
    """

    length: int
    protocol: WindowProtocol
    tokens: int
    loss: float
    density_by_layer: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)

    @property
    def attention_density(self) -> float | None:
        """Share of the causal scores that attention computed, mean over layers; None if nothing counts them."""
        return fmean(self.density_by_layer) if self.density_by_layer else None


def measure_loss(
    scorer: Scorer,
    tokens: npt.NDArray[np.int64],
    *,
    length: int,
    protocol: WindowProtocol,
    batch_tokens: int,
    attention: LosslessWindows | None = None,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Measure the mean loss of a text, cut into windows.

    Args:
        scorer: The model.
        tokens: The text, [tokens], int64.
        length: Inputs of a window.
        protocol: How the window moves.
        batch_tokens: Most inputs of one forward pass; a pass has at least one window.
        attention: Counts the scores that the model's attention computes; None if nothing counts them.
        progress: Called after each pass with the number of inputs in it, windows x length; a GPU's may not be done.
    Raises:
        InputError: the text is shorter than a window, or the protocol does not fit the length.
        TrainshortError: the loss is nan, or too large for a perplexity.
    """
    windows = place_windows(len(tokens), length=length, protocol=protocol)
    # a view of every window at stride 1, [tokens - length, length + 1]; indexing copies only a batch's windows
    views = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    batch = max(1, batch_tokens // length)
    # Sums stay where the losses are: reading one would wait for a GPU, which can begin the next batch meanwhile.
    sums, densities = [], _Densities(attention)
    with torch.no_grad():
        for first in range(0, windows.count, batch):
            starts = windows.starts(first, first + batch)
            losses = scorer.losses(torch.from_numpy(views[starts]))
            sums.append(_sum_scored(losses, windows=windows, first=first))
            densities.add(windows=len(starts))
            if progress is not None:
                progress(len(starts) * length)
    loss = float(torch.stack(sums).sum()) / windows.scored
    # `not <` instead of `>=`: nan must fail too.
    if not loss < _HIGHEST_LOSS:
        raise TrainshortError(
            f"the loss at length {length} is {loss}: the checkpoint's weights have diverged, take an earlier one"
        )
    return PerplexityResult(
        length=length, protocol=protocol, tokens=windows.scored, loss=loss, density_by_layer=densities.by_layer()
    )


@dataclass
class _Densities:
    """The densities of a measurement's passes; like the losses, they stay on the device until the end."""

    attention: LosslessWindows | None
    total: torch.Tensor | None = None
    windows: int = 0

    def __post_init__(self) -> None:
        if self.attention is not None:
            self.attention.take()  # of calls before the first pass

    def add(self, *, windows: int) -> None:
        """Add those of a pass over so many windows of text, one per block."""
        taken = self.attention.take() if self.attention is not None else []
        if taken:
            weighted = torch.stack(taken).double() * windows
            self.total = weighted if self.total is None else self.total + weighted
            self.windows += windows

    def by_layer(self) -> tuple[float, ...]:
        """Return each block's mean over windows."""
        return () if self.total is None else tuple((self.total / self.windows).tolist())


def _sum_scored(losses: torch.Tensor, *, windows: Windows, first: int) -> torch.Tensor:
    """Return the sum of the losses that a batch of windows scores, a scalar in fp64.

    Args:
        losses: [batch, length] fp32.
        windows: All windows of the text.
        first: Index of the batch's first window.
    """
    # In fp64: a sum of millions of fp32 losses would lose digits.
    exact = losses.double()
    total = exact[:, windows.first_scored(first + 1) :].sum()
    if first == 0:
        # The slice above left out the early predictions, which the text's first window scores too.
        total += exact[0, : windows.first_scored(1)].sum()
    return total
