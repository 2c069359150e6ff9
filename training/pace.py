"""How fast a start of a run goes: where its time went, and how long the rest takes. Imports no torch."""

import logging
from collections import deque
from dataclasses import dataclass
from functools import partial

from configs.schema import RunConfig
from configs.step_sizes import batch_of, samples_by_length
from training.flops import causal_flops_per_token

RECENT_STEPS = 100  # the speed may change, for example when another job shares the machine
FORWARD_SHARE = 1 / 3  # of a step's time per sample


@dataclass(frozen=True)
class Spent:
    """Seconds of one start of a run: in all, and in each kind of work."""

    total: float
    training: float
    validation: float
    saving: float


class Pace:
    """Measures a start of a run.

    Args:
        config: The run.
        step: The step that this start continues from.

    Attributes:
        steps_taken: Steps that this start has taken.
        samples_taken: Sequences of these steps.
    """

    def __init__(self, config: RunConfig, *, step: int) -> None:
        self._config, self._step, self._saved_step = config, step, step
        self.steps_taken = self.samples_taken = 0
        self._training = 0.0
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=RECENT_STEPS)  # seconds, work, sequences
        self._validations: list[float] = []
        self._saves: list[float] = []  # seconds that training waited for each
        self._waited = 0.0  # for the one that goes on
        self._stepped_at: float | None = None
        self._paused = 0.0  # seconds of saves since then

    def on_step(self, step: int, *, seconds: float, validation_seconds: float | None = None, now: float) -> None:
        """Take the times of a step.

        Args:
            step: Its number.
            seconds: Time of the step alone.
            validation_seconds: Time of the validation after it; None if there was none.
            now: Seconds of a clock that never goes back.
        """
        passed = seconds
        if self._stepped_at is not None:
            passed = max(seconds, now - self._stepped_at - self._paused - (validation_seconds or 0.0))
        if self.steps_taken == 1:
            self._recent.clear()  # the first step warms up: kernels are compiled, memory is allocated
        samples = batch_of(step, self._config.train)
        self._recent.append((passed, self._work(step - 1, step), samples))
        if validation_seconds is not None:
            self._validations.append(validation_seconds)
        self._training += seconds
        self.steps_taken += 1
        self.samples_taken += samples
        self._step, self._stepped_at, self._paused = step, now, 0.0

    def on_save(self, seconds: float, *, goes_on: bool = False) -> None:
        """Take the time that training waited for a save, also for one that failed.

        Args:
            seconds: The time.
            goes_on: Whether the save goes on in the background: training may wait for it again.
        """
        self._waited += seconds
        self._paused += seconds
        self._saved_step = self._step
        if not goes_on:
            self._saves.append(self._waited)
            self._waited = 0.0

    def on_rollback(self, step: int) -> None:
        """Take the time of the later steps as spent: they are taken again."""
        self._step = self._saved_step = step
        self._stepped_at, self._paused = None, 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of the recent steps; at least one must have been taken."""
        seconds, _, samples = map(sum, zip(*self._recent, strict=True))
        return samples * self._config.data.sequence_length / seconds

    @property
    def sample_seconds(self) -> float:
        """Time of a sequence that is not cut, by the recent steps; at least one must have been taken."""
        seconds, work, _ = map(sum, zip(*self._recent, strict=True))
        return seconds / work

    @property
    def step_seconds(self) -> float:
        """Time that the next step is expected to take."""
        return self.sample_seconds * self._work(self._step, self._step + 1)

    @property
    def seconds_left(self) -> float:
        """Time to the end of the run, with the validations and saves that it still has to do."""
        config, step = self._config, self._step
        steps, every, saves_every = config.train.steps, config.evaluate.every, config.checkpoint.every
        validations = steps // every - step // every if every else 0
        unsaved = step if self._saved_step == step else step - 1
        saves = -(-steps // saves_every) - max(0, unsaved) // saves_every
        return (
            self._work(step, steps) * self.sample_seconds
            + validations * self.validation_seconds
            + saves * (_mean(self._saves) if self._saves else 0.0)
        )

    def _work(self, first: int, last: int) -> float:
        """Return the work of the steps after one and up to another, in sequences that are not cut."""
        by_length = samples_by_length(first, last, self._config)
        return sum(samples * self._cost(length) for length, samples in by_length)

    def _cost(self, length: int) -> float:
        """Return the work of a token in sequences of a length, in that of one at the training length."""
        model, data = self._config.model, self._config.data
        count = partial(causal_flops_per_token, model, vocab_size=data.vocab_size)
        return count(length=length) / count(length=data.sequence_length)

    @property
    def validation_seconds(self) -> float:
        """Time that a validation is expected to take; 0 if the run has none."""
        if not self._config.evaluate.every:
            return 0.0
        if self._validations:
            return _mean(self._validations[1:] or self._validations)  # in the first kernels are compiled
        lengths = self._config.validation_lengths
        longer = max(lengths) / self._config.data.sequence_length  # each length has the tokens of the longest samples
        cost = longer * sum(map(self._cost, lengths))
        return self.sample_seconds * FORWARD_SHARE * self._config.evaluate.samples * cost

    def spent(self) -> Spent:
        """Return where the time of this process went; the rest of the total is its start and its end."""
        # logging counts from its import, at the beginning of the process
        total = logging.makeLogRecord({}).relativeCreated / 1000
        return Spent(total, self._training, sum(self._validations), sum(self._saves) + self._waited)


def _mean(seconds: list[float]) -> float:
    return sum(seconds) / len(seconds)
