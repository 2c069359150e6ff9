"""Copy a run's curves to another tracker than MLflow, from its files: each step once, and what was evaluated.

It runs beside training, on any machine that sees the run folder, and asks nothing of the ranks.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Protocol
from zlib import crc32

from configs.errors import InputError, MachineError
from configs.files import one_writer
from configs.paths import config_file, evaluation_folder, metrics_path
from configs.saved import saved_values
from training.appended_lines import AppendedLines
from training.curves.copied import Copied
from training.evaluation.kept import OTHER_MODEL, checkpoint_reports, read_report
from training.evaluation.tracked import tracked_values
from training.further_losses import PREFIX
from training.metrics_reader import step_fields
from training.tracking.names import METRIC_NAMES, tracked_name

STATE_FILE = "copied.json"
STEPS_PER_MARK = 1000


@dataclass(frozen=True)
class Evaluation:
    """What a report says.

    Attributes:
        step: The checkpoint's step.
        values: By their names in MLflow.
        is_new: Whether it was not copied before.
    """

    step: int
    values: Mapping[str, float]
    is_new: bool


class CurveWriter(Protocol):
    """Another tracker's run."""

    def start(self, *, first_step: int) -> None:
        """Begin or go on; what was written of this step and those after it does not hold any more."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step, by their names in MLflow."""
        ...

    def write_evaluations(self, evaluations: Sequence[Evaluation]) -> None:
        """Add the new ones among all evaluations, which are in the order of their steps."""
        ...

    def flush(self) -> None:
        """Hand over what was written."""
        ...

    def close(self) -> None:
        """End the copy, not the run."""
        ...


class CurveCopy:
    """The copy of one run folder. A context manager: close it before another process copies the same.

    Attributes:
        run_dir: The run folder.
        config: The run file's values.
        name: The run's name.
        copied: How far it is copied.
    """

    def __init__(self, run_dir: Path, folder: str) -> None:
        """Take a run folder, and the name of the folder in it that holds the copy's files.

        Raises:
            InputError: it is no run folder, its run file is damaged, or it cannot be written.
            MachineError: another process copies it there.
        """
        if not config_file(run_dir).is_file():
            raise InputError(f"{run_dir} is no run folder: name the folder of a run that has started")
        try:
            self.config = saved_values(config_file(run_dir))
            self.name = str(self.config["run"]["name"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{config_file(run_dir)} is not the run file of a start ({error}): copy that of a checkpoint there"
            ) from None
        self.run_dir, self.folder = run_dir, run_dir / folder
        self._stack = ExitStack()
        try:
            self.folder.mkdir(exist_ok=True)
            self._stack.enter_context(one_writer(self.folder, on_wait=self._refuse))
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}): fix its permissions") from None
        self._state = self.folder / STATE_FILE
        self._begin()

    def _begin(self) -> None:
        self.copied = Copied.read(self._state)
        self._lines = AppendedLines(metrics_path(self.run_dir))
        self._has_started = False

    def __enter__(self) -> "CurveCopy":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tracker_id(self) -> str:
        """Return the copy's name at its tracker, which is kept before it is used.

        Raises:
            MachineError: it cannot be kept.
        """
        if self.copied.run_id is None:
            self.copied.run_id, self.copied.place = token_hex(4), str(self._state.absolute())
            with self._saying_what_fails():
                self.copied.write(self._state)
        return self.copied.run_id

    def update(self, writer: CurveWriter) -> int:
        """Copy what was added since the last time; return the number of steps and reports: 0 if the folder was removed.

        After an error, the next call goes on from what the copy is known to hold.

        Raises:
            MachineError: a file of the run cannot be read, or one of the copy cannot be written.
        """
        if not self.folder.is_dir():  # a tracker would make it again
            return 0
        try:
            with self._saying_what_fails():
                count = self._copy_steps(writer) + self._copy_evaluations(writer)
                self._save(writer)
        except MachineError:
            self._begin()
            raise
        return count

    @contextmanager
    def _saying_what_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(
                f"{self.run_dir} cannot be copied to {error.filename or self.folder} ({error.strerror}): free space or "
                "fix permissions, and run the command again"
            ) from None

    def _copy_steps(self, writer: CurveWriter) -> int:
        known, count, last = 0, 0, None  # lines that are copied
        if self._lines.starts_over() or not self._has_started:
            self._has_started = True
            whole = AppendedLines(metrics_path(self.run_dir))
            whole.starts_over()
            known = self.copied.forget_after(whole.read())
            writer.start(first_step=self.copied.newest_step + 1)
        for line in islice(self._lines.read(), known, None):
            fields = step_fields(line)
            if fields is not None:
                writer.write(fields["step"], _values_of(line))
                last, count = (fields["step"], line), count + 1
                if count % STEPS_PER_MARK == 0:  # a command that is killed in a long copy goes on from here
                    self.copied.mark(*last)
                    self._save(writer)
        if last is not None and count % STEPS_PER_MARK:
            self.copied.mark(*last)
        return count

    def _save(self, writer: CurveWriter) -> None:
        writer.flush()
        self.copied.write(self._state)

    def _copy_evaluations(self, writer: CurveWriter) -> int:
        evaluations, reports = [], dict[str, int]()
        for label, file in _reports_of(self.run_dir):
            with suppress(InputError, FileNotFoundError):  # of another version, or about to be replaced
                name, checksum = str(file.relative_to(self.run_dir)), crc32(file.read_bytes())
                report, is_new = read_report(file), self.copied.reports.get(name) != checksum
                evaluations.append(Evaluation(report["step"], tracked_values(report, label=label), is_new))
                reports[name] = checksum
        count = sum(each.is_new for each in evaluations)
        if count:
            writer.write_evaluations(sorted(evaluations, key=lambda each: each.step))
            self.copied.reports = reports
        return count

    def _refuse(self) -> None:
        raise MachineError(f"another process copies {self.run_dir} to {self.folder.name}: let it, or end it")


def _reports_of(run_dir: Path) -> Iterator[tuple[str, Path]]:
    """Yield the reports on the run's checkpoints, each after its label; those on other models are not the run's."""
    for folder in sorted(evaluation_folder(run_dir).glob("*/")):
        with suppress(InputError):  # one of version 0.1.0 that is damaged
            if not folder.name.startswith(OTHER_MODEL):
                yield from checkpoint_reports(run_dir, checkpoint=folder.name).items()


def _values_of(line: bytes) -> dict[str, float]:
    """Return the finite numbers of a line of metrics.jsonl by their names in MLflow."""
    values = {
        tracked_name(field): value
        for field, value in json.loads(line, parse_int=float).items()  # damage may make a number of hundreds of digits
        if (field in METRIC_NAMES or field.startswith(PREFIX)) and isinstance(value, float)
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}
