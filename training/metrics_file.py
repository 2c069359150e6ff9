"""metrics.jsonl: one JSON object per step, each step once over all starts of a run."""

import errno
import json
import logging
import os
import secrets
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from configs.files import whole_file
from configs.paths import logs_folder
from training.observers import Status, StepResult

logger = logging.getLogger(__name__)

SPARSE_FIELDS = (
    "validation_loss",
    "validation_seconds",
    "save_seconds",
    "failed_saves",
)  # left out if None; other fields are then null


class MetricsFile:
    """Writes the result of each step to metrics.jsonl."""

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        """Open the file to append after `last_step`; move later steps and torn lines of an earlier start to logs/."""
        path = run_dir / "metrics.jsonl"
        # A power cut may leave any bytes. A line that is not UTF-8 is invalid, and is moved too.
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if _is_step_up_to(line, last_step)]
        if len(kept) < len(lines):
            logs_folder(run_dir).mkdir(exist_ok=True)
            with (logs_folder(run_dir) / "metrics_discarded.jsonl").open("a", encoding="utf-8") as discarded:
                discarded.writelines(line for line in lines if not _is_step_up_to(line, last_step))
        # Always write a new file: an older start that is still alive then appends to the old one, now without a name.
        # Open it before the rename: afterwards the name may belong to the file of a newer start.
        with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
            self._path, self._handle = path, os.open(temporary, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._handle).st_size  # of whole lines
        self._waiting = b""

    def on_step(self, result: StepResult) -> None:
        """Append one line; while the disk is full, keep lines in memory."""
        values = asdict(result)
        fields = {name: value for name, value in values.items() if value is not None or name not in SPARSE_FIELDS}
        warned = bool(self._waiting)
        self._waiting += json.dumps(fields).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not warned:
                logger.error("%s cannot be written (%s): its lines wait in memory", self._path, error.strerror)

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


def _is_step_up_to(line: str, last_step: int) -> bool:
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= last_step
    except (ValueError, KeyError, TypeError):
        return False
