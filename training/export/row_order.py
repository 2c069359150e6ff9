"""The order of the rows of a fused query-key-value matrix in other formats."""

from torch import Tensor

from training.families.description import Axis


def reorder_rows(
    weight: Tensor, *, heads: int, source: tuple[Axis, Axis, Axis], target: tuple[Axis, Axis, Axis]
) -> Tensor:
    """Return a fused query-key-value matrix, or its bias, with its rows in another order.

    Args:
        weight: [3 * heads * head_dim, ...].
        heads: Heads of the model.
        source: Its order, the slowest axis first.
        target: The order to return.
    """
    sizes = {"head": heads, "part": 3, "dim": len(weight) // (3 * heads)}
    parts = weight.view(*(sizes[axis] for axis in source), *weight.shape[1:])
    order = [source.index(axis) for axis in target]
    return parts.permute(*order, *range(3, parts.ndim)).reshape(weight.shape)
