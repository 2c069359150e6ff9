"""Losses added up while windows are scored: by place in the window, and by unit of the text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        by_position: Sums by place in the window, [length].
        by_unit: Sums by unit of the text, [units].
        density_by_layer: Share of the causal scores that each block's attention computed, mean over heads and windows;
            empty if its kernel does not count them.
    """

    by_position: Floats
    by_unit: Floats
    density_by_layer: tuple[float, ...] = ()


class _State(NamedTuple):
    """What is added up so far: replaced as a whole, so that Ctrl-C within a batch cannot leave half of it."""

    by_position: torch.Tensor
    by_unit: torch.Tensor
    densities: torch.Tensor
    """Sum over windows, [blocks]; empty before the first that is counted."""
    counted: int
    """Windows that densities are known of."""
    done: int


class LossSums:
    """The sums of a measurement's windows so far.

    They stay on the device, in fp64: reading one would wait for a GPU, which can begin the next batch meanwhile, and a
    sum of millions of fp32 losses would lose digits.

    Attributes:
        windows: The windows.
    """

    def __init__(self, windows: Windows, units: Units, *, attention: LosslessWindows | None = None) -> None:
        """Start from zero.

        Args:
            windows: The windows.
            units: Units of the text.
            attention: Counts the scores that the model's attention computes; None if nothing counts them.
        """
        self.windows, self._units, self._attention = windows, units, attention
        positions, each_unit, none = (torch.zeros(n, dtype=torch.float64) for n in (windows.length, units.count, 0))
        self._state = _State(positions, each_unit, none, 0, 0)

    @property
    def done(self) -> int:
        """Windows that are scored, the first ones."""
        return self._state.done

    def add(self, losses: torch.Tensor, *, batch: slice) -> None:
        """Add the losses of a batch of windows, the one after those that are done.

        Args:
            losses: Losses of the last predictions of each window, [windows, predictions] fp32, on any device.
            batch: The windows.
        """
        state, device = self._state, losses.device
        assert batch.start == state.done, "batches are added in their order"
        first = self.windows.length - losses.shape[1]  # place of the first column
        places = np.arange(first, self.windows.length)
        from_, to = self.windows.scored_from[batch, None], self.windows.scored_to[batch, None]
        is_scored = (places >= from_) & (places < to)  # [windows, predictions]
        tokens = self.windows.starts[batch, None] + places + 1
        exact = torch.where(_on(device, is_scored), losses.double(), 0.0)
        by_position = state.by_position.to(device, copy=True)
        by_position[first:] += exact.sum(0)
        units = _on(device, self._units.of(tokens).ravel())
        by_unit = state.by_unit.to(device).index_add(0, units, exact.ravel())
        densities, counted = self._densities(len(losses))
        self._state = _State(by_position, by_unit, densities, counted, batch.stop)

    def totals(self) -> Totals:
        """Return the sums; waits for the device."""
        by_position, by_unit, densities, counted, _ = self._state
        return Totals(by_position.cpu().numpy(), by_unit.cpu().numpy(), tuple((densities / max(1, counted)).tolist()))

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all of it, to go on from later; waits for the device."""
        return {name: np.asarray(torch.as_tensor(value).cpu()) for name, value in self._state._asdict().items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `to_arrays` returned.

        Raises:
            KeyError, ValueError: it is of other windows or units.
        """
        by_position, by_unit, densities = (
            torch.from_numpy(arrays[name]) for name in ("by_position", "by_unit", "densities")
        )
        if (len(by_position), len(by_unit)) != (self.windows.length, self._units.count):
            raise ValueError("sums of other windows")
        self._state = _State(by_position, by_unit, densities, int(arrays["counted"]), int(arrays["done"]))

    def forget_calls(self) -> None:
        """Drop the densities of calls before the next pass, which are not of these windows."""
        if self._attention is not None:
            self._attention.take()

    def _densities(self, windows: int) -> tuple[torch.Tensor, int]:
        """Return the densities with those of a pass over some windows, and the number of windows that they are of."""
        before, counted = self._state.densities, self._state.counted
        taken = self._attention.take() if self._attention is not None else []  # one per block
        if not taken:
            return before, counted
        weighted = torch.stack(taken).double() * windows
        return weighted + before.to(weighted.device) if len(before) else weighted, counted + windows


def _on(device: torch.device, values: npt.NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
