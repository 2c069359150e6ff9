"""Pipeline stages: DeepSpeed's PipelineModule over a plan, cut where our layout says."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from torch import nn

from parallel.groups import Groups
from parallel.layout import stage_bounds
from parallel.libraries import LayerSpec, PipelineModule, TiedLayerSpec
from parallel.plan import LayerPlan, Maker


class _Layer(LayerSpec):  # type: ignore[misc]
    """A layer that DeepSpeed builds on the stage that holds it."""

    def __init__(self, make: Maker) -> None:
        super().__init__(nn.Module)
        self._make = make

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer."""
        return self._make()


class _TiedLayer(TiedLayerSpec):  # type: ignore[misc]
    """The word embedding, whose weight the first and the last stage keep equal."""

    def __init__(self, make: Maker, *, forward_fn: Any = None) -> None:
        super().__init__("embedding", nn.Module, forward_fn=forward_fn, tied_weight_attr=["weight"])
        self._make = make

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer."""
        return self._make()


class StagedModule(PipelineModule):  # type: ignore[misc]
    """This stage's layers of a plan."""

    def __init__(self, plan: LayerPlan, *, groups: Groups) -> None:
        self._blocks, self._lead = len(plan.blocks), 1 + len(plan.before)
        layers = [
            _TiedLayer(plan.embedding),
            *map(_Layer, (*plan.before, *plan.blocks, *plan.after)),
            _TiedLayer(plan.embedding, forward_fn=plan.head),
        ]
        with redirect_stdout(StringIO()):  # DeepSpeed prints its settings
            super().__init__(layers, topology=groups.grid.topology(), loss_fn=plan.loss)

    def _partition_layers(self, method: str = "") -> None:
        # DeepSpeed's own methods weigh layers by size or name; ours is stated once, in the layout.
        bounds = [self._lead + bound for bound in stage_bounds(self._blocks, stages=self.num_stages)]
        self.parts = [0, *bounds[1:-1], len(self._layer_specs)]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _synchronize_tied_weights(self) -> None:
        # Nothing to do: both stages draw, or load, the same weight by its name. DeepSpeed would broadcast
        # a parameter that has a gradient, which torch warns of at each start.
        pass
