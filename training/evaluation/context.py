"""Is far context used? The loss of the same tokens with their context cut, or shuffled, beyond a number of tokens.

Sections of the text are scored again and again. In a window that begins W tokens before a prediction, the model sees W
tokens and nothing else. A window of its own for each prediction would cost W inputs: instead each window scores a few
neighbouring ones, so a prediction sees at least W tokens and at most a quarter more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import PCG64, SeedSequence

from training.evaluation.partial import PartialResults
from training.evaluation.perplexity import Scorer, require_finite, score_windows
from training.evaluation.resampling import SEED, Units, drawn_losses, interval
from training.evaluation.sums import LossSums
from training.evaluation.usable import effective_context
from training.evaluation.windows import Windows

_SCORED_TOKENS = 8192  # of all sections; differences of the same tokens are small, and so are their errors
_SECTION_SHARE = 8  # a section is this part of the longest context
_OVERLAP = 4  # a window scores this part of its context
_SHUFFLED_SHARE = 32  # windows with shuffled tokens score this part of the longest context: each of them is long
_SHORTEST_SHUFFLED = 16


@dataclass(frozen=True)
class ContextPoint:
    """A context to score the sections with.

    Attributes:
        context: Tokens that a prediction sees in order, at least.
        windows: The windows.
        shuffled: Inputs at the beginning of each window that are shuffled.
    """

    context: int
    windows: Windows
    shuffled: int = 0

    @property
    def name(self) -> str:
        """What it does besides scoring its windows."""
        return f"shuffles {self.shuffled}" if self.shuffled else ""


@dataclass(frozen=True)
class ContextPlan:
    """What to measure of the context; each point scores the same tokens.

    Attributes:
        cut: Points that see nothing else, the shortest first; in the last one windows have the longest length.
        shuffled: Points whose windows are alike, and see the rest shuffled; in the last one nothing is.
    """

    cut: tuple[ContextPoint, ...]
    shuffled: tuple[ContextPoint, ...]

    @property
    def points(self) -> tuple[ContextPoint, ...]:
        """All points, in the order in which they are measured."""
        return self.cut + self.shuffled

    @property
    def inputs(self) -> int:
        """Inputs of all windows: a measure of the work."""
        return sum(point.windows.inputs for point in self.points)


def plan_context(tokens: int, *, longest: int) -> ContextPlan:
    """Return the points of both curves.

    Args:
        tokens: Tokens of the text, more than `longest`.
        longest: Inputs of the longest window.
    """
    section = max(1, longest // _SECTION_SHARE)
    whole = longest - section + 1  # what a section's first prediction sees in the longest window
    ends = _section_ends(tokens, longest=longest, section=section)
    doublings = [2**power for power in range(whole.bit_length())]
    contexts = sorted({*doublings, *(3 * each for each in doublings)})
    cut = [
        ContextPoint(each, _windows(ends, section=section, scored=min(section, max(1, each // _OVERLAP)), context=each))
        for each in (*(each for each in contexts if each < whole), whole)
    ]
    scored = max(1, longest // _SHUFFLED_SHARE)
    alike = _windows(ends, section=section, scored=scored, context=whole)
    kept = [each for each in doublings if max(_SHORTEST_SHUFFLED, scored) <= each < whole]
    return ContextPlan(
        cut=tuple(cut),
        shuffled=tuple(ContextPoint(each, alike, shuffled=whole - each) for each in (*kept, whole)) if kept else (),
    )


def run_context(
    scorer: Scorer,
    tokens: npt.NDArray[np.integer],
    plan: ContextPlan,
    *,
    begun: Sequence[LossSums],
    units: Units,
    batch_tokens: int,
    progress: Callable[[int], None],
    parts: PartialResults,
    begins: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Measure both curves; return what a report has under `context`.

    Args:
        scorer: The model.
        tokens: The text, [tokens].
        plan: What to measure.
        begun: Sums of each point, as an interrupted evaluation has left them.
        units: Units of the text.
        batch_tokens: Most inputs of one forward pass; a pass has at least one window.
        progress: Called after each pass with the number of inputs in it.
        parts: Keeps the sums, so that an interrupted evaluation goes on.
        begins: Whether each token begins a document that attention stays inside of, [tokens]; None if it sees all.
    Raises:
        TrainshortError: a loss is nan, or too large for a perplexity.
    """
    counts = plan.cut[0].windows.scored_in(units.starts)
    losses: list[float] = []
    drawn: list[npt.NDArray[np.float64]] = []
    for point, sums in zip(plan.points, begun, strict=True):
        bits = PCG64(SeedSequence((SEED, point.context)))
        bits.advance(sums.done * point.shuffled)
        change = partial(_shuffle, bits=bits, count=point.shuffled) if point.shuffled else None
        with parts.keep(sums, progress) as advance:
            score_windows(
                scorer, tokens, sums=sums, batch_tokens=batch_tokens, begins=begins, progress=advance, change=change
            )
        by_unit = sums.totals().by_unit
        losses.append(require_finite(float(by_unit.sum()) / point.windows.scored, length=point.windows.length))
        drawn.append(drawn_losses(by_unit, counts))
    return _curves(plan, losses, np.array(drawn))


def _curves(plan: ContextPlan, losses: Sequence[float], drawn: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return both curves as a report has them.

    Args:
        plan: The points.
        losses: The loss of each.
        drawn: Its loss in each draw of the text's units, [points, draws].
    """
    cut, contexts = len(plan.cut), [point.context for point in plan.cut]
    # Errors are those of the difference from the last point: how hard the tokens are is in both.
    errors = (drawn[:cut] - drawn[cut - 1]).std(axis=1, ddof=1)
    in_draws = [effective_context(contexts, each) for each in drawn[:cut].T.tolist()]
    return {
        "longest": plan.cut[-1].windows.length,
        "tokens": plan.cut[0].windows.scored,
        "contexts": contexts,
        "loss": losses[:cut],
        "error_from_longest": errors.tolist(),
        "shuffled_contexts": [point.context for point in plan.shuffled],
        "shuffled_loss": losses[cut:],
        "effective_context": effective_context(contexts, losses[:cut]),
        "effective_context_interval": [int(end) for end in interval(np.array(in_draws))],
    }


def _section_ends(tokens: int, *, longest: int, section: int) -> npt.NDArray[np.int64]:
    """Return the last token of each section, [sections], spread evenly over the text; sections do not overlap."""
    first, last = longest, tokens - 1
    fitting = 1 + (last - first) // section
    count = min(fitting, -(-_SCORED_TOKENS // section))
    step = (last - first) // (count - 1) if count > 1 else 1
    return first + np.arange(count, dtype=np.int64) * step


def _windows(ends: npt.NDArray[np.int64], *, section: int, scored: int, context: int) -> Windows:
    """Return windows whose predictions see at least `context` tokens, and less than `scored` more.

    Args:
        ends: Last token of each section.
        section: Tokens of a section.
        scored: Tokens that a window scores; the last window of a section may score fewer.
        context: Tokens that its first prediction sees.
    """
    length = context + scored - 1
    firsts = np.arange(0, section, scored, dtype=np.int64)  # first token of each window's block, within the section
    blocks = np.minimum(firsts + scored, section)  # end of each block
    starts = (ends[:, None] - section + blocks - length).ravel()
    scored_from = np.tile(length - (blocks - firsts), len(ends))
    return Windows(length, starts, scored_from, np.full_like(starts, length))


def _shuffle(inputs: torch.Tensor, *, bits: PCG64, count: int) -> torch.Tensor:
    """Return windows with their first tokens shuffled, each window in an order of its own.

    Args:
        inputs: [batch, length + 1] int64.
        bits: Goes on from batch to batch, so the orders do not depend on the size of a batch.
        count: How many of the first tokens.
    """
    # Raw bits and a stable sort stay the same in later versions of numpy.
    order = np.argsort(bits.random_raw(len(inputs) * count).reshape(-1, count), axis=1, kind="stable")
    return torch.cat((inputs[:, :count].gather(1, torch.from_numpy(order)), inputs[:, count:]), dim=1)
