"""Gradients between the backward pass and the optimizer.

Where DeepSpeed does not partition them, they are added up once, in fp32, and clipped by the optimizer's own kernel:
in its engine without ZeRO, whose optimizer steps the parameters, and in its BF16_Optimizer. Nothing waits for the
device.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from parallel.axes import Group, Groups
from parallel.early_reduction import EarlyReduction
from parallel.libraries import (
    BF16_Optimizer,
    ColumnParallelLinear,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    RowParallelLinear,
    VocabParallelEmbedding,
    megatron_layers,
)
from parallel.shards import shard_of
from parallel.weight_gradient import add_product
from parallel.whole_matrices import joined_then_cut

# megatron's linears call an extension of this name, which adds their weight's gradient to its `main_grad`.
megatron_layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(  # type: ignore[attr-defined]
    wgrad_gemm_accum_fp32=lambda x, gradient, total: add_product(total, gradient, x)
)


def patch_gradients(engine: Any, *, groups: Groups, clip: float, overlap: bool = False) -> None:
    """Patch an engine to reduce, clip and step without copies and without waiting for the device.

    Engines whose gradients DeepSpeed partitions do as DeepSpeed does, but for the sum of the norm over stages.

    Args:
        engine: DeepSpeed's engine, with its optimizer's state.
        groups: The axes.
        clip: Largest global gradient norm.
        overlap: Whether to reduce gradients while others are computed, with BF16_Optimizer.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        _sum_norm_once(optimizer, device=engine.device)
        _keep_until_reduced(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        return
    if groups.data.size == 1:
        # DeepSpeed would copy all gradients into a buffer, sum it over one rank, and copy them back.
        engine.enable_backward_allreduce = engine.pipeline_enable_backward_allreduce = False
    if isinstance(optimizer, BF16_Optimizer):
        _patch_bf16(engine, groups=groups, clip=clip, overlap=overlap)
        return

    def clip_gradients() -> None:
        engine._global_grad_norm = _global_norm(engine, groups=groups)
        _clip(optimizer, engine._global_grad_norm, clip=clip)

    engine.clip_fp32_gradients = clip_gradients


def _patch_bf16(engine: Any, *, groups: Groups, clip: float, overlap: bool) -> None:
    optimizer, data = engine.optimizer, groups.data
    early = EarlyReduction(engine, data=data) if overlap and data.size > 1 else None
    reduce = early.finish if early else partial(_reduce_to_owners, optimizer, data=data)
    for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter._hp_grad = gradient
    add_from_now_on(engine)
    optimizer.update_hp_grads = lambda **_: _add_others(optimizer)
    engine.buffered_allreduce_fallback = lambda **_: reduce()
    masters, gradients = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    counted = _counted_parts(optimizer, groups=groups)

    def step() -> None:
        # As DeepSpeed's own, which would read the norm on the host, and set gradients to zero once more than needed.
        optimizer._global_grad_norm = _norm(counted, group=groups.world.handle, size=groups.world.size)
        _clip(optimizer.optimizer, optimizer._global_grad_norm, clip=clip)
        optimizer.optimizer.step()
        optimizer.update_lp_params()

    optimizer.step = step


def _sum_norm_once(optimizer: Any, *, device: torch.device) -> None:
    """Sum the gradient norm over tensor ranks and stages once a step.

    DeepSpeed does so once for each parameter group. Stages need not have as many groups as each other, and those with
    fewer would leave the others waiting: only the first and the last stage have an embedding.
    """
    own_norm, sum_over_model = optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce

    def scaled_global_norm() -> Tensor:
        with patch.object(optimizer, "_model_parallel_all_reduce", lambda tensor, op: None):
            own: Tensor = own_norm()  # infinite if it is not finite; on the CPU if the optimizer is offloaded
        squares = own.to(device).square()  # NCCL sends from GPUs alone
        sum_over_model(tensor=squares, op=dist.ReduceOp.SUM)
        return squares.sqrt().to(own.device)

    optimizer.scaled_global_norm = scaled_global_norm


def _keep_until_reduced(optimizer: Any) -> None:
    """Keep a gradient's memory until the stream that reduces gradients has read it.

    DeepSpeed copies gradients into a bucket, but at ZeRO 2 reduces one that is larger than that in its own memory, and
    drops it as soon as that is queued: the backward pass would write over it before it is sent.
    """
    average = optimizer.average_tensor

    def average_tensor(tensor: Tensor, communication_data_type: torch.dtype) -> None:
        if optimizer.overlap_comm:  # else one stream does both
            tensor.record_stream(optimizer.reduction_stream)
        average(tensor, communication_data_type)

    optimizer.average_tensor = average_tensor


@torch.no_grad()
def _add_others(optimizer: Any) -> None:
    """Add the gradients that no product has added, those of norms, biases and tables, and free them.

    DeepSpeed calls this after each backward pass; its own would convert and add them one by one.
    """
    groups = zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients, optimizer.fp32_groups_gradients_flat, strict=True
    )
    for parameters, totals, flat in groups:
        given = [(p, total) for p, total in zip(parameters, totals, strict=True) if p.grad is not None]
        if given and len(given) == len(parameters):  # norms and biases: one addition for all
            joined = torch.cat([parameter.grad.flatten() for parameter in parameters])
            flat[: len(joined)].add_(joined)
        else:
            for parameter, total in given:
                total.add_(parameter.grad.flatten())
        for parameter in parameters:
            parameter.grad = None


@torch.no_grad()
def _reduce_to_owners(optimizer: Any, *, data: Group) -> None:
    """Average each data rank's own part of the fp32 gradients over the data ranks; the other parts are then of no use.

    DeepSpeed's own averages all of them on all ranks, which sends twice as much, and joins small groups in a copy.
    """
    wholes, parts = optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition
    for whole, part in zip(wholes, parts, strict=True):
        dist.reduce_scatter_tensor(part, whole, group=data.handle)  # NCCL needs no copy, as the part lies in the whole
        part.mul_(1 / data.size)


def gradient_of(engine: Any, parameter: nn.Parameter) -> Tensor | None:
    """Return a parameter's gradient so far, in its shape; None before the first backward pass of a step."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        gradient: Tensor = parameter._hp_grad  # type: ignore[attr-defined]
        return gradient.view(parameter.shape)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        return engine.optimizer.get_param_gradient_attribute(parameter)  # type: ignore[no-any-return]
    return parameter.grad


def sum_tied_gradients(engine: Any, *, data: Group) -> None:
    """Give each stage's copy of a tied parameter the same gradient, bit for bit.

    Sum over the data ranks first, then over the stages: a sum of two has one order. DeepSpeed then averages the
    gradient over the data ranks, like any other: one rank hands it the sum and the others zeros, which add up exactly
    in any order.

    Args:
        engine: DeepSpeed's pipeline engine, before it reduces gradients.
        data: The data axis.
    """
    for parameter, stages in engine.module.get_tied_weights_and_groups():
        gradient = gradient_of(engine, parameter)
        assert gradient is not None, "a stage gave a tied parameter no gradient, so the other stages would wait"
        if data.size > 1:
            dist.all_reduce(gradient, group=data.handle)
        dist.all_reduce(gradient, group=stages)
        if data.rank > 0:
            gradient.zero_()


def add_from_now_on(engine: Any) -> None:
    """Let the next backward passes add weights' gradients to those that are there, in the products themselves."""
    for layer in _layers(engine.module):
        if (gradient := gradient_of(engine, layer.weight)) is not None:
            layer.weight.main_grad = gradient
            layer.gradient_accumulation_fusion = True


def add_no_more(engine: Any) -> None:
    """Let the next backward pass write new gradients: so none take memory before, and none are set to zero."""
    for layer in _layers(engine.module):
        layer.gradient_accumulation_fusion = False
        layer.weight.__dict__.pop("main_grad", None)


def adds_in_turn(engine: Any) -> bool:
    """Return whether the first backward pass of a step writes gradients to which the others add."""
    wrappers = DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer
    return not isinstance(engine.optimizer, wrappers)


def _clip(optimizer: torch.optim.Optimizer, norm: Tensor, *, clip: float) -> None:
    """Make the optimizer's next step clip to a global norm; a step without a finite norm changes nothing."""
    scale = ((norm + 1e-6) / clip).clamp(min=1.0)
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "an optimizer must be one of torch's fused ones"
    # They divide gradients and skip a step themselves, without a pass over memory.
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]


def _global_norm(engine: Any, *, groups: Groups) -> Tensor:
    """Return the norm of all gradients, of which each data rank has all; a scalar on the device."""
    counted = (parameter for parameter in engine.module.parameters() if _counts(parameter, tensor=groups.tensor))
    gradients = [parameter.grad for parameter in counted if parameter.grad is not None]
    size = groups.tensor.size * groups.pipeline.size
    return _norm(gradients, group=groups.grid.get_model_parallel_group(), size=size)


def _counted_parts(optimizer: Any, *, groups: Groups) -> list[Tensor]:
    """Return the gradients that this rank counts of its own part, each parameter's; BF16_Optimizer keeps them."""
    counted, data = [], groups.data
    for parameters, part in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True):
        shards, numels = [shard_of(parameter) for parameter in parameters], [each.numel() for each in parameters]
        places = joined_then_cut(shards, numels, size=len(part), rank=data.rank, ranks=data.size)
        for parameter, place in zip(parameters, places, strict=True):
            size = place.size(data.rank)
            if size and _counts(parameter, tensor=groups.tensor):
                counted.append(part[place.offset : place.offset + size])
        counted.append(part[:0])  # some tensor, on the device
    return counted


def _counts(parameter: nn.Parameter, *, tensor: Group) -> bool:
    """Return whether a parameter is counted on this rank: on one of those that hold the same."""
    # DeepSpeed marks a tied weight on all stages but one.
    is_tied = getattr(parameter, "ds_pipe_replicated", False)
    return not is_tied and (tensor.rank == 0 or shard_of(parameter).dim is not None)


def _norm(gradients: list[Tensor], *, group: Any, size: int) -> Tensor:
    """Return the norm of gradients of this rank and of the others of a process group, a scalar on the device."""
    total = get_total_norm(gradients).square()
    if size > 1:
        dist.all_reduce(total, group=group)
    return total.sqrt()


def _layers(module: nn.Module) -> Iterator[Any]:
    """Return the layers that can add to their weight's `main_grad`."""
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    return (layer for layer in module.modules() if isinstance(layer, kinds))
