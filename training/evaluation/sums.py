"""Losses added up while windows are scored: by place in the window, and by unit of the text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from training.evaluation.resampling import Units
from training.evaluation.windows import Windows
from training.model.windows import LosslessWindows

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Totals:
    """Sums of the losses of scored predictions, in nats.

    Attributes:
        by_position: By place in the window, [length].
        by_unit: By unit of the text, [units].
        density_by_layer: Share of the causal scores that each block's attention computed, mean over heads and windows;
            empty if its kernel does not count them.
    """

    by_position: Floats
    by_unit: Floats
    density_by_layer: tuple[float, ...] = ()


class LossSums:
    """The sums of a measurement's windows so far.

    They stay on the device, in fp64: reading one would wait for a GPU, which can begin the next batch meanwhile, and a
    sum of millions of fp32 losses would lose digits.

    Attributes:
        done: Windows that are scored, the first ones.
    """

    def __init__(self, windows: Windows, units: Units, *, attention: LosslessWindows | None = None) -> None:
        """Begin.

        Args:
            windows: The windows.
            units: Units of the text.
            attention: Counts the scores that the model's attention computes; None if nothing counts them.
        """
        self._windows, self._units, self._attention = windows, units, attention
        self._by_position = torch.zeros(windows.length, dtype=torch.float64)
        self._by_unit = torch.zeros(units.count, dtype=torch.float64)
        self._densities: torch.Tensor | None = None
        self._counted = 0
        self.done = 0
        if attention is not None:
            attention.take()  # of calls before the first pass

    def add(self, losses: torch.Tensor, *, batch: slice) -> None:
        """Add the losses of a batch of windows, the one after those that are done.

        Args:
            losses: Of the last predictions of each window, [windows, predictions] fp32, on any device.
            batch: The windows.
        """
        assert batch.start == self.done, "batches are added in their order"
        self._by_position, self._by_unit = self._by_position.to(losses.device), self._by_unit.to(losses.device)
        first = self._windows.length - losses.shape[1]  # place of the first column
        places = np.arange(first, self._windows.length)
        from_, to = self._windows.scored_from[batch, None], self._windows.scored_to[batch, None]
        is_scored = (places >= from_) & (places < to)  # [windows, predictions]
        tokens = self._windows.starts[batch, None] + places + 1
        exact = torch.where(_on(losses.device, is_scored), losses.double(), 0.0)
        self._by_position[first:] += exact.sum(0)
        units = self._units.of(tokens)
        self._by_unit.index_add_(0, _on(losses.device, units.ravel()), exact.ravel())
        self._add_densities(len(losses))
        self.done = batch.stop

    def totals(self) -> Totals:
        """Return the sums; waits for the device."""
        densities = () if self._densities is None else tuple((self._densities / self._counted).tolist())
        return Totals(self._by_position.cpu().numpy(), self._by_unit.cpu().numpy(), densities)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all of it, to go on from later; waits for the device."""
        none = torch.zeros(0, dtype=torch.float64)
        tensors = {
            "by_position": self._by_position,
            "by_unit": self._by_unit,
            "densities": none if self._densities is None else self._densities,
        }
        arrays: dict[str, npt.NDArray[Any]] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        return {**arrays, "done": np.array([self.done, self._counted])}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `to_arrays` returned."""
        self._by_position, self._by_unit = (torch.from_numpy(arrays[name]) for name in ("by_position", "by_unit"))
        densities = torch.from_numpy(arrays["densities"])
        self._densities = densities if len(densities) else None
        self.done, self._counted = map(int, arrays["done"])

    def _add_densities(self, windows: int) -> None:
        taken = self._attention.take() if self._attention is not None else []  # one per block
        if taken:
            weighted = torch.stack(taken).double() * windows
            before = self._densities
            self._densities = weighted if before is None else before.to(weighted.device) + weighted
            self._counted += windows


def _on(device: torch.device, values: npt.NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
