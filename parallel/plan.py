"""A decoder as a list of layers not yet built, so that each pipeline stage builds only its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

Maker = Callable[[], nn.Module]


@dataclass(frozen=True)
class LayerPlan:
    """Functions that build the layers, in order.

    Attributes:
        embedding: Builds the word embedding, which the last stage shares.
        head: Function from the word embedding and states [batch, seq, hidden] to local logits.
        before: Layers between the word embedding and the blocks; they live on the first stage.
        blocks: The blocks, spread over the stages.
        after: Layers between the blocks and the head; they live on the last stage.
        loss: Function from local logits and targets [batch, seq] to a scalar.
        shared: A module whose weights all blocks use, or None; every stage holds an equal copy.
    """

    embedding: Maker
    head: Callable[[Any, Tensor], Tensor]
    before: tuple[Maker, ...]
    blocks: tuple[Maker, ...]
    after: tuple[Maker, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    shared: nn.Module | None = None

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
        )
