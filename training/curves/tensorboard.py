"""A run's curves as TensorBoard's event files, in RUN_DIR/tensorboard."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from configs.strict_yaml import dump_yaml
from training.curves.copy import CurveCopy, Evaluation


class TensorBoardWriter:
    """Implement `CurveWriter`. Evaluations have a folder of their own, which is written again with each new one.

    TensorBoard wants the steps of a curve in order, and checkpoints are evaluated in any.
    """

    def __init__(self, copy: CurveCopy) -> None:
        """Take the copy."""
        self._folder, self._config = copy.folder, copy.config
        self._steps: Any = None
        self._print_failure, threading.excepthook = threading.excepthook, self._on_failure

    def start(self, *, first_step: int) -> None:
        """See `CurveWriter`."""
        self._close_steps()
        self._steps = _open(self._folder, first_step=first_step)
        self._steps.add_text("run file", f"```yaml\n{dump_yaml(self._config)}```", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `CurveWriter`."""
        for name, value in values.items():
            self._steps.add_scalar(name, value, step)

    def write_evaluations(self, evaluations: Sequence[Evaluation]) -> None:
        """See `CurveWriter`."""
        writer = _open(self._folder / "evaluation", first_step=0)
        try:
            for evaluation in evaluations:
                for name, value in evaluation.values.items():
                    writer.add_scalar(name, value, evaluation.step)
            writer.flush()  # says what close() does not
        finally:
            _close(writer)

    def flush(self) -> None:
        """See `CurveWriter`."""
        self._steps.flush()

    def close(self) -> None:
        """See `CurveWriter`."""
        self._close_steps()
        threading.excepthook = self._print_failure

    def _close_steps(self) -> None:
        if self._steps is not None:
            _close(self._steps)

    def _on_failure(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread where a disk is full: `flush` raises the same."""
        if failure.exc_type is None or not issubclass(failure.exc_type, OSError):
            self._print_failure(failure)


def _open(folder: Path, *, first_step: int) -> Any:
    """Return a writer; TensorBoard drops what earlier files hold from a step on."""
    writer: Any = SummaryWriter  # untyped
    return writer(str(folder), purge_step=first_step)


def _close(writer: Any) -> None:
    with suppress(OSError):  # flush() has said so
        writer.close()
