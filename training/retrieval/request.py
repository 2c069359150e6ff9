"""What `retrieval` is asked to measure, and what can be refused of it without a model. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.load import load_run
from configs.positions import scale_for
from configs.precisions import DEFAULT_PRECISION, require_precision
from configs.scales import parse_scale
from data_pipeline.text import require_text_file
from training.checkpoint.manifest import CONFIG_NAME, require_checkpoint
from training.evaluation.precheck import run_data
from training.retrieval.tasks import (
    DEFAULT_DEPTHS,
    DEFAULT_LENGTHS,
    DEFAULT_SAMPLES,
    DEFAULT_SEED,
    TASKS,
    RetrievalTask,
    require_tasks,
)

_SEED_LIMIT = 2**64
_MOST_DEPTHS = 101  # one per percent


@dataclass(frozen=True)
class RetrievalRequest:
    """What to measure.

    Attributes:
        tasks: Names of tasks.
        lengths: Lengths in tokens, or in training lengths with an x behind the number.
        depths: Number of depths, evenly from the beginning to the end.
        samples: Prompts of each task, length and depth.
        seed: Seed of the prompts.
        data: File of the haystack; None for the run's held-out text.
        scale: Value of `--scale`, as in `configs.scales`; None to leave positions as trained.
        precision: Value of `--precision`.
        command: The command line, to be named in the report; None if no command asks.
    """

    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[str] = DEFAULT_LENGTHS
    depths: int = DEFAULT_DEPTHS
    samples: int = DEFAULT_SAMPLES
    seed: int = DEFAULT_SEED
    data: Path | None = None
    scale: str | None = None
    precision: str = DEFAULT_PRECISION
    command: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no model could be measured with."""
        require_precision(self.precision)
        require_tasks(self.tasks)
        if self.scale is not None:
            parse_scale(self.scale)
        self.resolved_lengths(train_length=1)
        if not 2 <= self.depths <= _MOST_DEPTHS:
            raise InputError(f"--depths must be from 2 to {_MOST_DEPTHS}, got {self.depths}: use {DEFAULT_DEPTHS}")
        if not 0 <= self.seed < _SEED_LIMIT:
            raise InputError(f"seed must be from 0 to {_SEED_LIMIT - 1}, got {self.seed}: use {DEFAULT_SEED}")

    def resolved_lengths(self, *, train_length: int) -> tuple[int, ...]:
        """Return the lengths in tokens, each once, the shortest first.

        Raises:
            InputError: one is not a length.
        """
        for length in self.lengths:
            if not re.fullmatch(r"[1-9][0-9]{0,8}x?", length):
                raise InputError(
                    f"--lengths must be tokens, or training lengths as in 2x, separated by commas, got "
                    f"{','.join(self.lengths)!r}: write 1x,2x or 1024,2048"
                )
        times = {length: train_length if length.endswith("x") else 1 for length in self.lengths}
        return tuple(sorted({int(length.rstrip("x")) * unit for length, unit in times.items()}))

    def depths_of(self, task: RetrievalTask) -> tuple[float | None, ...]:
        """Return the depths of the asked needle: 0 at the beginning, 1 at the end; None for any place."""
        if task.is_spread:
            return (None,)
        return tuple(number / (self.depths - 1) for number in range(self.depths))

    def samples_of(self, task: RetrievalTask) -> int:
        """Return the prompts of each cell: each length gets the same number, whether its task has depths or not."""
        return self.samples * self.depths if task.is_spread else self.samples


def check_retrieval(checkpoint: Path, request: RetrievalRequest) -> None:
    """Refuse a checkpoint or a text that cannot be measured, as far as that needs no model.

    Raises:
        InputError: names what is wrong.
    """
    folder = require_checkpoint(checkpoint)
    config = load_run(str(folder / CONFIG_NAME))
    if request.scale is not None:
        scale_for(request.scale, config.model)
    if request.data is not None:
        require_text_file(request.data)
    else:
        run_data(folder, config=config)
