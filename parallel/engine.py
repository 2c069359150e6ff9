"""The interface of an engine, the same with and without pipeline stages. Imports no DeepSpeed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from parallel.parameter import Shard


@dataclass(frozen=True)
class StepOutcome:
    """What a rank knows of one optimizer step: scalars on its device, which may not be computed yet.

    Attributes:
        loss: Mean over this rank's micro-batches, nats per token, fp32; zero on ranks of other stages than the last.
        grad_norm: Global, before clipping, fp32; the same on every rank.
        loss_scale: Factor of the loss with which no gradient overflowed, or the last; None where none was given.
    """

    loss: Tensor
    grad_norm: Tensor
    loss_scale: float | None = None


class State(Protocol):
    """Access to fp32 weights and optimizer state of this rank's part of the model, by logical name.

    Attributes:
        parameters: This rank's parameters and their shards.
        kinds: The kinds of tensors that training keeps per parameter: `weight`, then the optimizer's moments.
    """

    parameters: dict[str, tuple[nn.Parameter, Shard]]
    kinds: tuple[str, ...]

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """Return those of `kinds` that are kept of a parameter; the optimizer may have fewer moments of some."""
        ...

    def read(self, name: str, kind: str) -> Tensor:
        """Return this tensor rank's slice, fp32. A collective: all data ranks call it in one order."""
        ...

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Set this tensor rank's slice; for a weight, also update the forward pass's copy."""
        ...

    def set_step(self, step: int) -> None:
        """Set the optimizer's step count."""
        ...


class Engine(Protocol):
    """This rank's part of the decoder, with its optimizer.

    Attributes:
        module: This rank's layers.
    """

    module: nn.Module

    def train_step(
        self, micro_batches: Sequence[Tensor], *, learning_rate: float, loss_scale: float | None = None
    ) -> StepOutcome:
        """Take one optimizer step on this data rank's micro-batches.

        Where the gradients overflow, they are computed again with half the loss scale and torch's same seed, until they
        fit or it is 1, or the loss is not finite either. With a gradient norm that is not finite nothing changes.

        Args:
            micro_batches: Each as `parallel.documents.split_batch` takes it.
            learning_rate: The optimizer's.
            loss_scale: Factor of the loss, a power of two, in a precision that needs one.
        """
        ...

    def mean_loss(self, micro_batches: Sequence[Tensor]) -> float:
        """Return the mean loss over all data ranks, without training; any length, the same on every rank."""
        ...

    def local_logits(self, tokens: Tensor) -> Tensor | None:
        """Return [batch, seq, local_vocab] of tokens [batch, seq] on the ranks of the last stage, None elsewhere."""
        ...

    def state(self) -> State:
        """Return access to weights and optimizer state."""
        ...
