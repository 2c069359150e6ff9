"""metrics.jsonl: one JSON object per step, each step once over all starts of a run."""

import errno
import json
import logging
import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import whole_file
from configs.paths import certificates_path, discarded_metrics_path, logs_folder, metrics_path
from training.metrics_reader import newest_step, step_fields
from training.observers import Observer, Status, StepResult

logger = logging.getLogger(__name__)

SPARSE_FIELDS = (
    "attention_density",
    "validation_loss",
    "validation_seconds",
    "save_seconds",
    "failed_saves",
    "rollbacks",
    "loss_scale",
    "energy_joules",
)  # left out if None; other fields are then null
# In a line of logs/: the number of the start that took the step, and took it again after a divergence.
ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of all starts of a run, and the step that it was measured after."""

    loss: float
    step: int


def validation_of(fields: dict[str, Any]) -> Best | None:
    """Return the validation in the fields of a step; None if the step has none."""
    loss = fields.get("validation_loss")
    return Best(loss, fields["step"]) if isinstance(loss, float) else None


def better_of(best: Best | None, measured: Best | None) -> Best | None:
    """Return the lower of two validations; a loss that is nan does not count."""
    if measured is None or not math.isfinite(measured.loss):
        return best
    return measured if best is None or measured.loss < best.loss else best


class MetricsFile(Observer):
    """Writes the result of each step to metrics.jsonl.

    Attributes:
        best: The best validation of earlier starts; None if there is none.
    """

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        """Open the file to append after `last_step`; move later steps and torn lines of an earlier start to logs/."""
        self._run_dir, self._waiting = run_dir, b""
        self._open(last_step)

    def _open(self, last_step: int, *, taken_by: int | None = None) -> None:
        """See `__init__`; `taken_by` is the number of the start that takes the later steps again."""
        self.best: Best | None = None
        run_dir, path = self._run_dir, metrics_path(self._run_dir)
        kept, discarded = [], []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            fields = step_fields(line)
            if fields is None or fields["step"] > last_step:
                if fields is not None and taken_by is not None:
                    line = json.dumps({**fields, ROLLED_BACK: taken_by}).encode() + b"\n"
                discarded.append(line)
                continue
            kept.append(line)
            self.best = better_of(self.best, validation_of(fields))
        if discarded:
            logs_folder(run_dir).mkdir(exist_ok=True)
            with discarded_metrics_path(run_dir).open("ab") as file:
                file.writelines(discarded)
        # Always write a new file: an older start that is still alive then appends to the old one, now without a name.
        # Open it before the rename: afterwards the name may belong to the file of a newer start.
        with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
            temporary.write_bytes(b"".join(kept))
            self._path, self._handle = path, os.open(temporary, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._handle).st_size  # of whole lines

    def on_step(self, result: StepResult) -> None:
        """Append one line; while the disk is full, keep lines in memory."""
        values = result.fields()
        fields = {name: value for name, value in values.items() if value is not None or name not in SPARSE_FIELDS}
        warned = bool(self._waiting)
        self._waiting += json.dumps(fields).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not warned:
                logger.error("%s cannot be written (%s): its lines wait in memory", self._path, error.strerror)

    def on_rollback(self, step: int) -> None:
        """Move later steps to logs/: they are taken again."""
        with suppress(OSError):
            self._write()
        lines = self._waiting.splitlines(keepends=True)
        self._waiting = b"".join(line for line in lines if json.loads(line)["step"] <= step)
        before = self._handle
        certificates = certificates_path(self._run_dir)  # it has a line per start
        starts = certificates.read_bytes().count(b"\n") if certificates.exists() else 1
        self._open(step, taken_by=starts)
        os.close(before)

    def before_save(self) -> None:
        """Flush the lines to disk: a resume from the checkpoint would not train their steps again."""
        with suppress(OSError):  # on_step has reported a full disk, and the save will too
            self._write()
            os.fsync(self._handle)

    def close(self, status: Status) -> None:
        """Write what is left and close the file."""
        with suppress(OSError):
            self._write()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            logger.error("%s lacks its last %d lines: they could not be written", self._path, lines)
        os.close(self._handle)

    def _write(self) -> None:
        os.ftruncate(self._handle, self._size)  # remove a partial line that a full disk left
        written = os.write(self._handle, self._waiting)
        if written < len(self._waiting):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size, self._waiting = self._size + written, b""


def last_reported_step(run_dir: Path) -> int:
    """Return the last step in metrics.jsonl; 0 if there is none."""
    with suppress(InputError):
        return int(newest_step(run_dir).get("step", 0))
    return 0
