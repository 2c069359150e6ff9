"""The starts of a run: which steps each took, which of them were lost, and when saves failed. Imports no torch.

metrics.jsonl has no times of day, but the seconds of each step, validation and save; certificates.jsonl has the time
at which each start began to train.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from configs.paths import certificates_path, discarded_metrics_path
from training.evaluation.kept import Kept, Step
from training.metrics_file import ROLLED_BACK
from training.metrics_reader import STEP_TIMES, step_fields
from training.step_columns import StepColumns

_TIMED = ("step", *STEP_TIMES, "failed_saves")
_FIELDS = (*_TIMED, "energy_joules")
_LOST_FIELDS = (*_FIELDS, "rollbacks")

Happening = Literal["saved", "failed"]


class _Rank(Kept):
    model_config = ConfigDict(allow_inf_nan=True)  # an error may be infinite
    rank: Step
    tensor_rank: Step
    stage: Step
    data_rank: Step
    heads: list[int]
    backend: str
    precision: str
    device: str
    error: float | None


class _Certificate(Kept):
    """What a page reads of a line of certificates.jsonl."""

    position: str = ""
    ranks: Annotated[list[_Rank], Field(min_length=1)]


@dataclass(frozen=True)
class Stretch:
    """Steps that follow each other, all kept or all lost."""

    steps: StepColumns
    is_lost: bool

    @cached_property
    def seconds(self) -> float:
        """Their time, with validations and saves."""
        return sum(time or 0.0 for times in self.steps.rows(*STEP_TIMES) for time in times)


@dataclass(frozen=True)
class RunStart:
    """One start of a run.

    Attributes:
        certificate: What it stated in certificates.jsonl; empty for a run of a version without.
        step: The step that it continued from.
        steps: Times, failed saves and energy of the steps that it took and that the run kept.
        lost: The same of those that no checkpoint had when the next start began, or that were before a rollback: they
            were taken again. Each has its number of rollbacks before it too.
    """

    certificate: dict[str, Any]
    step: int
    steps: StepColumns = StepColumns(_FIELDS)
    lost: StepColumns = StepColumns(_LOST_FIELDS)

    @property
    def began_at(self) -> datetime | None:
        """When it began to train; None if that is not known."""
        with suppress(KeyError, TypeError, ValueError):
            return datetime.fromisoformat(self.certificate["started_at"])
        return None

    @property
    def refused(self) -> str | None:
        """Why it was refused; None for one that trained."""
        refused = self.certificate.get("refused")
        return None if refused is None else str(refused)

    @property
    def ranks(self) -> int | None:
        """How many ranks it had; None if that is not known."""
        return len(self.certificate.get("ranks", ())) or None

    @cached_property
    def kept_seconds(self) -> float:
        """Time of the steps that the run kept, with their validations and saves."""
        return sum(stretch.seconds for stretch in self.stretches if not stretch.is_lost)

    @cached_property
    def lost_seconds(self) -> float:
        """Time of the steps that were lost."""
        return sum(stretch.seconds for stretch in self.stretches if stretch.is_lost)

    @property
    def last_step(self) -> int:
        """The last step that it took."""
        return int(max([self.step, *self.steps.known("step"), *self.lost.known("step")]))

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Its steps in the order in which it took them: those that it lost lie before those that it took again."""
        kept = [int(step or 0) for step in self.steps.values("step")]
        lost = [(int(step or 0), times) for step, times in self.lost.rows("step", "rollbacks")]
        stretches, done = [], 0
        for again in _runs(lost):
            until = bisect_left(kept, lost[again.start][0], lo=done)
            stretches += [Stretch(self.steps.chosen(range(done, until), fields=_TIMED), is_lost=False)]
            stretches += [Stretch(self.lost.chosen(again, fields=_TIMED), is_lost=True)]
            done = until
        stretches.append(Stretch(self.steps.chosen(range(done, len(kept)), fields=_TIMED), is_lost=False))
        return tuple(stretch for stretch in stretches if stretch.steps)

    def saves(self) -> Iterator[tuple[float, int, Happening]]:
        """Yield each save that a later step reports: seconds since the start began to train, the step, what happened.

        A step reports the save before it, and how many have failed so far. So the save after the last step is missing.
        """
        seconds, failed = 0.0, 0
        for step, *times, failures in chain.from_iterable(stretch.steps.rows(*_TIMED) for stretch in self.stretches):
            now_failed = int(failures or failed)
            if (saving := times[-1]) is not None:
                # in the background one save may fail at its end and the next at its begin
                happened: list[Happening] = ["failed"] * (now_failed - failed) or ["saved"]
                yield from ((seconds + saving, int(step or 0) - 1, each) for each in happened)
            failed = now_failed
            seconds += sum(time or 0.0 for time in times)


def read_starts(run_dir: Path, steps: StepColumns) -> tuple[RunStart, ...]:
    """Return the starts of a run in order; one for all steps if certificates.jsonl is missing.

    Args:
        run_dir: The run folder.
        steps: Its steps, as in metrics.jsonl.
    """
    certificates = _lines(certificates_path(run_dir), needs="ranks")
    starts = [RunStart(each, each["step"]) for each in certificates if _is_whole(each)]
    if not starts and not steps:
        return ()
    numbers = [int(step or 0) for step in steps.values("step")]
    if not starts or (numbers and numbers[0] <= starts[0].step):
        starts.insert(0, RunStart({}, 0))  # of a version that wrote no certificates
    taken: list[list[int]] = [[] for _ in starts]
    for place, step in enumerate(numbers):
        taken[_taker(starts, step)].append(place)
    lost: list[list[dict[str, Any]]] = [[] for _ in starts]
    for before, fields in _discarded(run_dir, starts):
        lost[_taker(starts[:before], fields["step"])].append(fields)
    return tuple(
        replace(start, steps=steps.chosen(places, fields=_FIELDS), lost=StepColumns(_LOST_FIELDS, lost_steps))
        for start, places, lost_steps in zip(starts, taken, lost, strict=True)
    )


def _taker(starts: Sequence[RunStart], step: int) -> int:
    """Return the number of the start that took a step: the latest that continued from an earlier one."""
    latest = range(len(starts) - 1, -1, -1)
    return next((number for number in latest if starts[number].step < step and starts[number].refused is None), 0)


def _discarded(run_dir: Path, starts: Sequence[RunStart]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lost steps, each with the number of the start that found it lost, of the last such start first.

    Those that a start itself took again, after a divergence, come before. Each start adds the steps past its checkpoint
    to the end of one file: they begin with the step after it, and rise.
    """
    lines = [*_lines(discarded_metrics_path(run_dir), needs="loss")]
    rest = [fields for fields in lines if ROLLED_BACK not in fields]
    unknown = int(not starts[0].certificate)  # a start that stated nothing
    yield from ((unknown + int(fields[ROLLED_BACK]), fields) for fields in lines if ROLLED_BACK in fields)
    for number in range(len(starts) - 1, 0, -1):
        place = len(rest)
        while place and (place == len(rest) or rest[place - 1]["step"] < rest[place]["step"]):
            place -= 1
            if rest[place]["step"] == starts[number].step + 1 and starts[number].refused is None:
                yield from ((number, fields) for fields in rest[place:])
                del rest[place:]
                break
    yield from ((1, fields) for fields in rest)  # their first line was torn


def _lines(path: Path, *, needs: str) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file of JSON that have a step and another key; none if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        for line in file:
            if (fields := step_fields(line)) is not None and needs in fields:
                yield fields


def _is_whole(certificate: dict[str, Any]) -> bool:
    with suppress(ValidationError):
        _Certificate.model_validate(certificate)
        return True
    return False


def _runs(lost: Sequence[tuple[int, float | None]]) -> Iterator[range]:
    """Yield the places of each stretch of steps that follow each other, with as many rollbacks before them."""
    begin = 0
    for place in range(1, len(lost) + 1):
        step, rollbacks = lost[place - 1]
        if place == len(lost) or lost[place] != (step + 1, rollbacks):
            yield range(begin, place)
            begin = place
