"""A model's weights as other formats have them: the order of a fused matrix's rows, transposition, scale."""

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.schema import Model
from training.families.description import QKV_ORDER, Parameter, RowOrder, WeightLayout


def in_format(layout: WeightLayout, parameter: Parameter, weights: Mapping[str, Tensor], *, model: Model) -> Tensor:
    """Return a parameter's weight as a format has it.

    Args:
        layout: How the format has weights.
        parameter: One of the model's.
        weights: Whole tensors by logical name.
        model: The decoder's shape.
    """
    weight = weights[parameter.shard.name]
    if parameter.is_qkv:
        weight = scale_queries(weight, model=model, by=query_scale(layout, model))
        weight = _reorder_rows(weight, heads=model.heads, source=QKV_ORDER, target=layout.qkv)
    return _transposed(layout, parameter, weight)


def from_format(layout: WeightLayout, parameter: Parameter, weight: Tensor, *, model: Model) -> Tensor:
    """Return a parameter's weight from that of a format: the reverse of `in_format`."""
    weight = _transposed(layout, parameter, weight)
    if not parameter.is_qkv:
        return weight
    weight = _reorder_rows(weight, heads=model.heads, source=layout.qkv, target=QKV_ORDER)
    return scale_queries(weight, model=model, by=1 / query_scale(layout, model))


def shape_in(layout: WeightLayout, parameter: Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter in a format."""
    shape = parameter.shard.shape
    return shape[::-1] if layout.transposes and parameter.shard.is_matrix else shape


def query_scale(layout: WeightLayout, model: Model) -> float:
    """Return by how much queries are larger in a format, whose scores are divided by more."""
    return model.head_dim**0.5 if layout.divides_by_width else 1.0


def scale_queries(weight: Tensor, *, model: Model, by: float) -> Tensor:
    """Return a fused query-key-value matrix, or its bias, with its queries times a number; rows are in our order."""
    if by == 1.0:
        return weight
    scaled = weight.clone(memory_format=torch.contiguous_format)
    scaled.view(model.heads, 3, -1)[:, 0] *= by
    return scaled


def _reorder_rows(weight: Tensor, *, heads: int, source: RowOrder, target: RowOrder) -> Tensor:
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


def _transposed(layout: WeightLayout, parameter: Parameter, weight: Tensor) -> Tensor:
    return weight.t().contiguous() if layout.transposes and parameter.shard.is_matrix else weight
