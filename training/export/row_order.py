"""The order of the rows of a fused query-key-value matrix in other formats."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from configs.choices import FAMILIES
from configs.schema import Model
from training.families.description import QKV_ORDER, Axis, Family, Parameter

RowOrder = tuple[Axis, Axis, Axis]


def order_in(layout: Literal["huggingface", "gguf"], model: Model) -> RowOrder:
    """Return the order of the rows of a model's fused matrix in a format, the slowest axis first."""
    family: Family = FAMILIES[model.family].load()
    return family.huggingface_qkv if layout == "huggingface" else family.gguf_qkv


def in_order_of(
    layout: Literal["huggingface", "gguf"], parameter: Parameter, weights: Mapping[str, Tensor], *, model: Model
) -> Tensor:
    """Return a parameter's weight with its rows as a format has them.

    Args:
        layout: The format.
        parameter: One of the model's.
        weights: Whole tensors by logical name, with rows in our order.
        model: The decoder's shape.
    """
    weight = weights[parameter.shard.name]
    if not parameter.is_qkv:
        return weight
    return reorder_rows(weight, heads=model.heads, source=QKV_ORDER, target=order_in(layout, model))


def reorder_rows(weight: Tensor, *, heads: int, source: RowOrder, target: RowOrder) -> Tensor:
    """Return a fused query-key-value matrix, or its bias, with its rows in another order.

    Args:
        weight: [3 * heads * head_dim, ...].
        heads: Heads of the model.
        source: Its order.
        target: The order to return.
    """
    sizes = {"head": heads, "part": 3, "dim": len(weight) // (3 * heads)}
    parts = weight.view(*(sizes[axis] for axis in source), *weight.shape[1:])
    order = [source.index(axis) for axis in target]
    return parts.permute(*order, *range(3, parts.ndim)).reshape(weight.shape)
