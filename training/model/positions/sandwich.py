"""Sandwich positions: the inner product of sinusoidal position vectors as a bias, compressed per head. Nothing learned.

Source: Chi et al., "Dissecting Transformer Length Extrapolation via the Lens of Receptive Field Analysis", ACL 2023,
arXiv 2212.10356, section 5: vectors of 128 numbers, head h of H divides by 8 h / H. The product of a vector with itself
is subtracted, which softmax does not see: a bias of 0 at distance 0 keeps digits.
"""

from functools import lru_cache

import torch
from torch import Tensor

from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from training.model.positions.bias import power_of_two
from training.model.positions.by_distance import DistanceBias
from training.model.positions.method import PositionMethod

WIDTH = 128  # of a position's vector: half of it sines, half cosines
_RATES = tuple(10000.0 ** (-2 * pair / WIDTH) for pair in range(WIDTH // 2))


class Sandwich(PositionMethod):
    """A penalty that grows about as the logarithm of the distance, and in waves far away."""

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank; there is no table."""
        super().__init__(model, tensor=tensor, table=table)
        compressions = [8 * (head + 1) / model.heads for head in self.heads]
        self._compressions = torch.tensor(compressions, dtype=torch.float64)
        self.bias = SandwichBias(self._compressions)

    def penalty(self, distances: int) -> Tensor:
        """Return products of vectors, less a vector's with itself, [local_heads, distances] fp64."""
        angles = torch.arange(distances, dtype=torch.float64)[:, None] * torch.tensor(_RATES, dtype=torch.float64)
        vectors = torch.cat([angles.sin(), angles.cos()], dim=1)  # [distances, WIDTH]
        products = (vectors @ vectors[-1]).flip(0)  # with the last one: the nearest first
        return (products - products[0]) / self._compressions[:, None]


class SandwichBias(DistanceBias):
    """The bias of heads with these compressions, [local_heads] fp64."""

    def __init__(self, compressions: Tensor) -> None:
        super().__init__()
        self._compressions = compressions
        self._known = torch.empty(len(compressions), 0)  # the bias at the first distances

    def by_distance(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the bias, [local_heads, count]."""
        known = self._known
        if (known.device, known.dtype) != (device, dtype) or known.shape[1] < count:
            waves = sandwich_waves(power_of_two(count)) / self._compressions[:, None]
            self._known = known = waves.to(device, dtype)  # once: each copy waits for a GPU
        return known[:, :count]


@lru_cache(maxsize=4)
def sandwich_waves(length: int) -> Tensor:
    """Return the sum of the cosines at each distance, less that at 0, [length] fp64 on the CPU."""
    distance = torch.arange(length, dtype=torch.float64)
    total = torch.zeros(length, dtype=torch.float64)
    for rate in _RATES:
        total += torch.cos(distance * rate) - 1
    return total
