"""Watch what the steps of a trainer wait for: collectives, and reads of a tensor's value by Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from parallel.engine import Engine, StepOutcome
from training.step_figures import FigureExchange, SentFigures, StepFigures


@dataclass
class Step:
    """From the end of the engine's step to the end of the next.

    Attributes:
        collectives: Those outside the engine.
        of_engine: Those of the engine's next step.
        reads: Values that Python read, but for those that `FigureExchange.read` reads of what has arrived.
    """

    collectives: list[str] = field(default_factory=list)
    of_engine: list[str] = field(default_factory=list)
    reads: int = 0


class Watch(TorchDispatchMode):
    """Records the operations of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [Step()]
        self.in_engine = self.in_read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step = self.steps[-1]
        if func.namespace == "c10d":
            (step.of_engine if self.in_engine else step.collectives).append(func.name())
        if func.name() == "aten::_local_scalar_dense" and not self.in_read:
            step.reads += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(engine: Engine) -> Iterator[Watch]:
    """Watch the steps that an engine takes in the block."""
    watch, train_step, read = Watch(), engine.train_step, FigureExchange.read

    def watched_step(*arguments: Any, **more: Any) -> StepOutcome:
        watch.in_engine = True
        outcome = train_step(*arguments, **more)
        watch.in_engine = False
        watch.steps.append(Step())
        return outcome

    def watched_read(self: FigureExchange, sent: SentFigures) -> StepFigures:
        watch.in_read = True
        figures = read(self, sent)
        watch.in_read = False
        return figures

    with patch.object(engine, "train_step", watched_step), patch.object(FigureExchange, "read", watched_read), watch:
        yield watch
