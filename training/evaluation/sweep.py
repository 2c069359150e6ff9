"""Plan the measurements of an evaluation, and make them one after the other."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.errors import InputError
from configs.protocols import WindowProtocol
from configs.scales import PositionScale
from training.evaluation.folder import ReportNotWritten
from training.evaluation.partial import PartialResults
from training.evaluation.perplexity import PerplexityResult, Scorer, measure_loss
from training.evaluation.progress import EvaluationProgress
from training.evaluation.resampling import Units
from training.evaluation.sums import LossSums
from training.evaluation.text import EvaluationText
from training.evaluation.windows import Windows, place_windows, same_tokens

logger = logging.getLogger(__name__)

# write what is finished once it has taken this long since the last time: a kill must not lose hours
_WRITE_SECONDS = 60.0


@dataclass(frozen=True)
class Measurement:
    """A measurement to make.

    Attributes:
        protocol: How the window moves.
        windows: The windows.
        same_tokens: Whether the measurements of other lengths score the same tokens.
        scale: Scales the model's positions; None to leave them as trained.
    """

    protocol: WindowProtocol
    windows: Windows
    same_tokens: bool = False
    scale: PositionScale | None = None

    @property
    def length(self) -> int:
        """Inputs of a window, in tokens."""
        return self.windows.length

    @property
    def inputs(self) -> int:
        """Inputs of all windows, windows x length: a measure of the work."""
        return self.windows.inputs

    @property
    def variant(self) -> str:
        """What its sums depend on besides its windows, for `PartialResults`."""
        return "" if self.scale is None else f"scale {self.scale}"

    def __str__(self) -> str:
        scale = "" if self.scale is None else f" {self.scale}"
        return f"{self.protocol}{scale} at {self.length:,}"


def plan_measurements(
    lengths: Sequence[int], protocols: Sequence[WindowProtocol], *, tokens: int, on_same_tokens: bool = False
) -> list[Measurement]:
    """Return one measurement per protocol and length; duplicates are dropped.

    Args:
        lengths: Inputs of a window.
        protocols: How windows move.
        tokens: Tokens of the text.
        on_same_tokens: Whether all lengths of a protocol score the same tokens.
    Raises:
        InputError: a length or a protocol does not fit. The message names all lengths that are too long for the text.
    """
    # place_windows reports only the first one: report all of them.
    too_long = [length for length in dict.fromkeys(lengths) if length > tokens - 1]
    if too_long and tokens > 1:
        named = ", ".join(map(str, too_long))
        raise InputError(
            f"the text has {tokens} tokens, too short for length {named}: use lengths up to {tokens - 1}, "
            "or give a longer text with --data"
        )
    same = same_tokens(tokens, lengths=lengths, protocols=protocols) if on_same_tokens else None
    return [
        Measurement(protocol, place_windows(tokens, length=length, protocol=protocol, same=same), on_same_tokens)
        for protocol in dict.fromkeys(protocols)
        for length in dict.fromkeys(lengths)
    ]


def run_measurements(
    scorer: Scorer,
    text: EvaluationText,
    measurements: Sequence[tuple[Measurement, LossSums]],
    *,
    units: Units,
    results: list[PerplexityResult],
    write: Callable[[], object],
    progress: EvaluationProgress,
    parts: PartialResults,
) -> None:
    """Make measurements.

    Args:
        scorer: The model.
        text: The text.
        measurements: What to measure, in this order, each with its sums as an interrupted evaluation has left them.
        units: Units of the text.
        results: The result of each is added here when it is finished.
        write: Called between two measurements, so that long work is not lost.
        progress: Shows how far they are.
        parts: Keeps the sums, so that an interrupted evaluation goes on.
    """
    written_at, batch_tokens = time.monotonic(), scorer.batch_tokens
    for measurement, sums in measurements:
        if results and time.monotonic() - written_at > _WRITE_SECONDS:
            _try_to_write(write)
            written_at = time.monotonic()
        progress.begin(str(measurement))
        with parts.keep(sums, progress.advance) as advance:
            result = measure_loss(
                scorer,
                text.tokens,
                protocol=measurement.protocol,
                units=units,
                sums=sums,
                batch_tokens=batch_tokens,
                same_tokens=measurement.same_tokens,
                scale=measurement.scale,
                begins=text.begins,
                progress=advance,
            )
        results.append(result)
        progress.finish(f"loss {result.loss:.4f}, perplexity {result.perplexity:,.2f}")


def _try_to_write(write: Callable[[], object]) -> None:
    try:
        write()
    except ReportNotWritten as error:  # the disk may have space again at the end
        logger.warning("the reports cannot be written yet: %s", error)
