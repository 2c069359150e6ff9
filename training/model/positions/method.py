"""The base class of position methods: embed, rotate, bias, and the penalty that a method promises.

Each method is a subclass in its own file, named by its row in `configs.positions`. This base class is the method
`none`.
"""

import torch
from torch import Tensor, nn

from configs.positions import POSITIONS
from configs.scales import Scaling
from configs.schema import Model
from parallel.axes import Group
from parallel.parameter import Shard
from training.families.description import Shards
from training.families.table import position_table_name
from training.model.positions.bias import Bias, SlopeBias
from training.model.positions.rows import Start
from training.model.windows import LosslessWindows


def local_heads(heads: int, *, tensor: Group) -> range:
    """Return the global numbers of this tensor rank's heads, [rank * local, (rank + 1) * local)."""
    local = heads // tensor.size
    return range(tensor.rank * local, (tensor.rank + 1) * local)


class PositionMethod:
    """No positions: order enters only through the causal mask.

    Attributes:
        heads: Global numbers of this tensor rank's heads.
        bias: What is added to the scores.
        module: Learned weights that all blocks share, or None.
    """

    def __init__(self, model: Model, *, tensor: Group, table: Shard | None) -> None:
        """Build the method for one tensor rank.

        Args:
            model: The decoder's shape.
            tensor: The tensor axis.
            table: The learned table, if `configs.positions` gives the method one.
        """
        self.heads = local_heads(model.heads, tensor=tensor)
        self.bias: Bias = SlopeBias(None)
        self.module: nn.Module | None = None

    def scale(self, scaling: Scaling | None) -> None:
        """Replace the trained slopes or rates by scaled ones, before the first call.

        Args:
            scaling: The scaling, for a method whose row in `configs.positions` has `scales`; None for those of the
                training.
        """
        assert scaling is None, f"{type(self).__name__} cannot be scaled"

    def embed(self, x: Tensor, *, start: Start) -> Tensor:
        """Return embeddings [seq, batch, hidden] with their positions; the first token is at `start`.

        Inside documents, `start` holds the positions of all tokens: take rows of a table by `rows_of`.
        """
        return x

    def rotate(self, q: Tensor, k: Tensor, *, start: Start) -> tuple[Tensor, Tensor]:
        """Return queries and keys [batch, local_heads, seq, head_dim], rotated by their positions from `start` on."""
        return q, k

    def penalty(self, distances: int) -> Tensor:
        """Return the promised penalty at each distance, which the certificate checks.

        Compute it in another way than `bias`, or an error would be on both sides.

        Args:
            distances: Number of distances, from 0 on.
        Returns:
            [local_heads, distances] fp64, on the CPU.
        """
        return torch.zeros(len(self.heads), distances, dtype=torch.float64)


def position_method(position: str) -> type[PositionMethod]:
    """Return the class for a value of `model.position`."""
    method: type[PositionMethod] = POSITIONS[position].load()
    return method


def make_position(model: Model, shards: Shards, *, tensor: Group, scaling: Scaling | None = None) -> PositionMethod:
    """Return a model's position method on one tensor rank.

    Args:
        model: The decoder's shape.
        shards: The model's shards; a learned table is among them.
        tensor: The tensor axis.
        scaling: Scales its slopes or rates; None to leave them as trained.
    """
    table = shards.get(position_table_name(model.position))
    method = position_method(model.position)(model, tensor=tensor, table=table)
    if scaling is not None:
        method.scale(scaling)
    bias = method.bias
    leaves_out = model.window is not None if bias.local_slopes is None else model.windows != "off"
    lossless = LosslessWindows(by_scores=model.windows == "scores")
    bias.lossless, bias.window = lossless if leaves_out else None, model.window
    return method
