"""Pipeline stages: DeepSpeed's PipelineModule over a plan, cut at the bounds of our layout."""

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import accumulate, chain, pairwise
from typing import Any

from torch import Tensor, nn

from parallel.axes import Groups
from parallel.documents import Documents
from parallel.libraries import LayerSpec, PipelineModule, TiedLayerSpec
from parallel.plan import LayerPlan, Maker


class _Layer(LayerSpec):  # type: ignore[misc]
    """A layer that DeepSpeed builds on the stage that holds it.

    Attributes:
        takes_documents: Whether it is called with states and the documents of the micro-batch.
    """

    def __init__(self, make: Maker, *, takes_documents: bool = False) -> None:
        super().__init__(nn.Module)  # DeepSpeed requires a class; `build` does not use it
        self._make, self.takes_documents = make, takes_documents

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer."""
        return self._make()


class _TiedLayer(TiedLayerSpec):  # type: ignore[misc]
    """A layer whose weight several stages hold; DeepSpeed keeps it equal by summing the gradients."""

    def __init__(self, key: str, make: Maker, *, forward_fn: Any = None) -> None:
        super().__init__(key, nn.Module, forward_fn=forward_fn, tied_weight_attr=["weight"])
        self._make = make

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer."""
        return self._make()


def _pass(_: nn.Module, x: Tensor) -> Tensor:
    return x


class StagedModule(PipelineModule):  # type: ignore[misc]
    """This stage's layers of a plan.

    Attributes:
        documents: Documents of the micro-batch of each coming forward pass; None where nothing is masked.
    """

    documents: Iterator[Documents | None] = iter(())

    def __init__(self, plan: LayerPlan, *, groups: Groups, bounds: Sequence[int]) -> None:
        """Build the layers of this stage.

        Args:
            plan: All layers.
            groups: The axes.
            bounds: Each stage's first block, and the end.
        """
        of_states = partial(_Layer, takes_documents=True)
        blocks = list(map(of_states, plan.blocks))
        stages: list[list[LayerSpec]] = [blocks[start:stop] for start, stop in pairwise(bounds)]
        if (shared := plan.shared) is not None:
            # Listed as a layer only to put it on every stage: the blocks call it themselves.
            stages = [[_TiedLayer("shared", lambda: shared, forward_fn=_pass), *stage] for stage in stages]
        # The head's layer passes states on to the loss: DeepSpeed keeps the last layer's output of two micro-batches.
        if plan.head_weight is None:
            embedding: LayerSpec = _TiedLayer("embedding", plan.embedding)
            head: LayerSpec = _TiedLayer("embedding", plan.embedding, forward_fn=_pass)
        else:
            embedding, head = _Layer(plan.embedding), _Layer(plan.head_weight)
        stages[0] = [embedding, *map(of_states, plan.before), *stages[0]]
        stages[-1] += [*map(of_states, plan.after), head]
        self._plan = plan
        self._bounds = list(accumulate(map(len, stages), initial=0))
        with redirect_stdout(StringIO()):  # DeepSpeed prints its settings
            super().__init__(list(chain(*stages)), topology=groups.grid.topology(), loss_fn=self._loss)
        self._takes_documents = [getattr(spec, "takes_documents", False) for spec in stages[self.stage_id]]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of this stage's layers for the next micro-batch: tokens or states -> states."""
        documents = next(self.documents)
        for layer, takes_documents in zip(self.forward_funcs, self._takes_documents, strict=True):
            x = layer(x, cache=documents) if takes_documents else layer(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return local logits [batch, seq, local_vocab] of the last layer's output, on the last stage."""
        return self._plan.logits(self._head_weight, x)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        # DeepSpeed's BF16_Optimizer zeroes every `grad` when the gradient reaches the output of the last layer, after
        # the head's own: in bf16 the weight needs its `main_grad`.
        return self._plan.loss(self._head_weight, x, targets)

    @property
    def _head_weight(self) -> Any:
        return self.tied_modules["embedding"] if self._plan.head_weight is None else self.forward_funcs[-1]

    def _partition_layers(self, method: str = "") -> None:
        # DeepSpeed would split by the size or name of layers: use our layout's bounds instead.
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _synchronize_tied_weights(self) -> None:
        # Both stages draw or load the same weight by its name, so nothing has to be sent. DeepSpeed would broadcast a
        # parameter that requires a gradient, and torch would warn at each start.
        pass
