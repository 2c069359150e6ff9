"""A decoder as a list of layers not yet built, so that each pipeline stage builds only its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from parallel.head import Head

Maker = Callable[[], nn.Module]
Recompute = Literal[False, True, "selective"]  # see `configs.schema.Train`


@dataclass(frozen=True)
class LayerPlan:
    """Functions that build the layers, in order.

    Attributes:
        embedding: Builds the word embedding.
        head: The head, which uses the word embedding, or what `head_weight` builds.
        before: Layers between the word embedding and the blocks; they live on the first stage.
        blocks: The blocks, spread over the stages.
        after: Layers between the blocks and the head; they live on the last stage.
        head_weight: Builds the layer that holds a weight of the head's own, on the last stage; None if the head shares
            the word embedding, which is then on the last stage too.
        shared: A module whose weights all blocks use, or None; every stage holds an equal copy.
    """

    embedding: Maker
    head: Head
    before: tuple[Maker, ...]
    blocks: tuple[Maker, ...]
    after: tuple[Maker, ...]
    head_weight: Maker | None = None
    shared: nn.Module | None = None

    def loss(self, embedding: Any, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of the last layer's output, a scalar; shapes as for `Head.loss`."""
        return self.head.loss(embedding, x, targets)

    def logits(self, embedding: Any, x: Tensor) -> Tensor:
        """Return local logits [batch, seq, local_vocab] of the last layer's output."""
        return self.head.logits(embedding, x)

    def placed(self, place: Callable[[nn.Module], nn.Module]) -> "LayerPlan":
        """Return the plan with each layer passed through `place` as soon as it is built, except the shared module."""

        def then_place(make: Maker) -> Maker:
            return lambda: place(make())

        return replace(
            self,
            embedding=then_place(self.embedding),
            before=tuple(map(then_place, self.before)),
            blocks=tuple(map(then_place, self.blocks)),
            after=tuple(map(then_place, self.after)),
            head_weight=None if self.head_weight is None else then_place(self.head_weight),
        )
