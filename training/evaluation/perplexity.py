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
from configs.scales import PositionScale
from training.evaluation.positions import LossByPosition, by_position
from training.evaluation.resampling import Units, drawn_losses
from training.evaluation.sums import LossSums

# exp overflows fp64 above this loss, so there is no perplexity to report
_HIGHEST_LOSS = math.log(1e300)


class Scorer(Protocol):
    """A model that evaluation can run.

    Attributes:
        batch_tokens: Inputs of one pass that use its device well.
    """

    @property
    def batch_tokens(self) -> int: ...

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        """Return the negative log-likelihood of predicted tokens; on a GPU, perhaps before it is computed.

        Args:
            tokens: [batch, length + 1] int64, of any length; or [batch, 2, length + 1] with the tokens and whether each
                begins a document.
            last: How many of the last predictions; None for all.
        Returns:
            Of the last tokens, in nats, [batch, last] fp32, on any device.
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
        draws: The loss of each draw of the text's units; empty if none was drawn.
        by_position: The loss by place in the window; None if it was not kept.
        same_tokens: Whether other lengths of the sweep score the same tokens.
        scale: What scaled the model's positions; None for positions as trained.
        ends_every: Tokens from the end of a window to the end of the next, where windows score their last predictions
            only; else None.
    """

    length: int
    protocol: WindowProtocol
    tokens: int
    loss: float
    density_by_layer: tuple[float, ...] = ()
    draws: tuple[float, ...] = ()
    by_position: LossByPosition | None = None
    same_tokens: bool = False
    scale: PositionScale | None = None
    ends_every: int | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the loss, in nats; None if no units were drawn."""
        return float(np.std(self.draws, ddof=1)) if self.draws else None

    @property
    def attention_density(self) -> float | None:
        """Share of the causal scores that attention computed, mean over layers; None if nothing counts them."""
        return fmean(self.density_by_layer) if self.density_by_layer else None


def measure_loss(
    scorer: Scorer,
    tokens: npt.NDArray[np.integer],
    *,
    protocol: WindowProtocol,
    units: Units,
    sums: LossSums,
    batch_tokens: int,
    same_tokens: bool = False,
    scale: PositionScale | None = None,
    begins: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Measure the mean loss of a text, cut into windows.

    Args:
        scorer: The model.
        tokens: The text, [tokens].
        protocol: How the windows were placed.
        units: Units of the text.
        sums: Sums of the windows; those that are done are not scored again.
        batch_tokens: Most inputs of one forward pass; a pass has at least one window.
        same_tokens: Whether other lengths of the sweep score the same tokens.
        scale: What scales the model's positions; None for positions as trained.
        begins: Whether each token begins a document that attention stays inside of, [tokens]; None if it sees all.
        progress: Called after each pass with the number of inputs in it, windows x length; a GPU's may not be done.
    Raises:
        TrainshortError: the loss is nan, or too large for a perplexity.
    """
    score_windows(scorer, tokens, sums=sums, batch_tokens=batch_tokens, begins=begins, progress=progress)
    windows, totals = sums.windows, sums.totals()
    scored = windows.scored
    loss = require_finite(float(totals.by_unit.sum()) / scored, length=windows.length)
    counts = windows.scored_in(units.starts)
    return PerplexityResult(
        length=windows.length,
        protocol=protocol,
        tokens=scored,
        loss=loss,
        density_by_layer=totals.density_by_layer,
        draws=tuple(drawn_losses(totals.by_unit, counts).tolist()),
        by_position=by_position(totals.by_position, windows.scored_at()),
        same_tokens=same_tokens,
        scale=scale,
        ends_every=None if protocol.last is None else int(windows.starts[0]) + windows.length,
    )


def score_windows(
    scorer: Scorer,
    tokens: npt.NDArray[np.integer],
    *,
    sums: LossSums,
    batch_tokens: int,
    begins: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int], None] | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Add up the losses of the windows that are not scored yet.

    Args:
        scorer: The model.
        tokens: The text, [tokens].
        sums: Sums of the windows; those that are done are left out.
        batch_tokens: Most inputs of one forward pass; a pass has at least one window.
        begins: Whether each token begins a document that attention stays inside of, [tokens]; None if it sees all.
        progress: Called after each pass with the number of inputs in it; a GPU's may not be done.
        change: Changes the tokens of each batch, [batch, length + 1], before the model sees them.
    """
    windows, length = sums.windows, sums.windows.length
    # a view of every window at stride 1, [tokens - length, length + 1]; indexing copies only a batch's windows
    views = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    beginnings = None if begins is None else np.lib.stride_tricks.sliding_window_view(begins, length + 1)
    sums.forget_calls()
    with torch.no_grad():
        for batch in windows.batches(most=max(1, batch_tokens // length), first=sums.done):
            starts = windows.starts[batch]
            inputs = torch.from_numpy(views[starts].astype(np.int64))
            if change is not None:
                inputs = change(inputs)
            if beginnings is not None:
                inputs = torch.stack((inputs, torch.from_numpy(beginnings[starts]).long()), dim=1)
            last = length - int(windows.scored_from[batch].min())
            sums.add(scorer.losses(inputs, last=last), batch=batch)
            if progress is not None:
                progress(len(inputs) * length)


def require_finite(loss: float, *, length: int) -> float:
    """Return a loss.

    Raises:
        TrainshortError: it is nan, or too large for a perplexity.
    """
    # `not <` instead of `>=`: nan must fail too.
    if not loss < _HIGHEST_LOSS:
        raise TrainshortError(
            f"the loss at length {length} is {loss}: the checkpoint's weights have diverged, take an earlier one"
        )
    return loss
