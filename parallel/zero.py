"""DeepSpeed's configuration, and access to fp32 weights and optimizer state, gathered from ZeRO's shards.

ZeRO flattens both and splits them over the data ranks. Callers see one tensor per parameter, at any ZeRO stage.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.choices import OptimizerChoice
from configs.precisions import PRECISIONS
from configs.schema import Train
from parallel.axes import Group, Groups
from parallel.layout import REDUCE_BUCKET, Layout, effective_zero
from parallel.libraries import (
    BF16_Optimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    ZeroParamStatus,
    deepspeed,
)
from parallel.parameter import Shard
from parallel.shards import shard_of
from parallel.whole_matrices import MatrixPart, cut_then_joined, joined_then_cut


def deepspeed_config(train: Train, *, layout: Layout) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run."""
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": layout.micro_batches,
        "gradient_clipping": train.clip,
        "zero_optimization": {
            "stage": effective_zero(train, layout=layout),
            "reduce_bucket_size": REDUCE_BUCKET,
            # Gradients are reduced while others are computed. A CPU has no second queue for it.
            "overlap_comm": layout.data > 1 and layout.zero > 1 and torch.cuda.is_available(),
            "contiguous_gradients": True,
            "offload_optimizer": {"device": layout.offload},
        },
        **PRECISIONS[train.precision].deepspeed,
        # Partitioned activations save little, and are wrong with sequence parallelism and with changing lengths.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 10**12,  # never
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro-batch
        "zero_force_ds_cpu_optimizer": False,
    }


def partition_layer(layer: nn.Module, *, train: Train, layout: Layout, groups: Groups) -> None:
    """Partition a layer's parameters over the data ranks, as ZeRO-3 keeps them; the whole ones are freed."""
    deepspeed.zero.Init(
        module=layer,
        data_parallel_group=groups.data.handle,
        config_dict_or_path=deepspeed_config(train, layout=layout),
        mpu=groups.grid,
    )


def start_optimizer(engine: Any, *, row: OptimizerChoice) -> None:
    """Allocate the optimizer's moments now instead of at the first step, so that a checkpoint can be read into them."""
    base = base_optimizer(engine)
    for master, parameters in _masters(engine):
        zeros = {moment: torch.zeros_like(master) for moment in _moments(row, parameters)}
        # beside its moments, where a fused optimizer counts steps without waiting
        base.state[master] = {"step": torch.zeros((), device=master.device), **zeros}
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def require_moments(engine: Any, *, row: OptimizerChoice) -> None:
    """Fail if the optimizer keeps other tensors than its row names: a checkpoint would lose them without a word."""
    base = base_optimizer(engine)
    for master, parameters in _masters(engine):
        kept, moments = {name for name in base.state[master] if name != "step"}, _moments(row, parameters)
        assert kept == set(moments), (
            f"the optimizer keeps {sorted(kept)}, its row in configs/choices.py {sorted(moments)}"
        )


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set the optimizer's step count; Adam's bias correction needs it."""
    for state in base_optimizer(engine).state.values():
        state["step"].fill_(float(step))


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def set_micro_batches(engine: Any, count: int) -> None:
    """Set how many micro-batches of this data rank the next step has."""
    engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    engine.micro_steps = 0  # DeepSpeed steps where the number of all micro-batches so far is a multiple


def drop_gradients(engine: Any) -> None:
    """Drop what a step that DeepSpeed left out has added up: with offload it would be added to the next one's."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)


def gradient_norm(engine: Any) -> Tensor:
    """Return the global gradient norm of the last step before clipping, a scalar on the device, fp32."""
    norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32)
    return norm.to(engine.device, non_blocking=True)  # with offload it is on the CPU


def read_state(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """Return one tensor rank's fp32 weight or moment, in the parameter's shape.

    A collective over the data ranks: each must call it for the same parameters in the same order.
    """
    if not _is_sharded(engine):
        state = parameter.data if kind == "weight" else base_optimizer(engine).state[parameter][kind]
        return state.detach().float().clone()
    whole = (
        deepspeed.utils.safe_get_full_fp32_param(parameter)
        if kind == "weight"
        else deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
    )
    assert isinstance(whole, Tensor), f"ZeRO holds no {kind} of {_name(parameter)}"
    return whole.detach()


def write_state(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Set one tensor rank's fp32 weight or moment; also update the model's own copy of a weight."""
    start, stop = held_range(engine, parameter)
    part = value.flatten()[start:stop]
    padding = stop - start - part.numel()
    write_held(engine, parameter, kind, torch.cat([part, part.new_zeros(padding)]) if padding else part)


def held_range(engine: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Return the part [start, stop) of a tensor rank's flat slice that `write_held` needs on this rank.

    ZeRO-3 cuts the flat parameter evenly over its data ranks, so the last part may reach past the end.
    """
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return 0, parameter.numel()
    size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = dist.get_rank(parameter.ds_process_group) * size  # type: ignore[attr-defined]
    return start, start + size


def write_held(engine: Any, parameter: nn.Parameter, kind: str, part: Tensor) -> None:
    """Set the `held_range` of one tensor rank's fp32 weight or moment; also update the model's own copy of a weight.

    Args:
        engine: DeepSpeed's engine.
        parameter: One of its parameters.
        kind: `weight` or a moment.
        part: Values [stop - start], zero past the end of the slice.
    """
    part = part.to(parameter.device, torch.float32)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        if kind == "weight":
            deepspeed.utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
            if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                parameter.partition()  # type: ignore[attr-defined]  # DeepSpeed keeps a small one gathered: drop it
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, part, kind)
        return
    value = part.view(parameter.shape)
    if not _is_sharded(engine):
        target = parameter.data if kind == "weight" else base_optimizer(engine).state[parameter][kind]
        target.copy_(value)
    elif kind == "weight":
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)


def _is_sharded(engine: Any) -> bool:
    return isinstance(engine.optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer | DeepSpeedZeroOptimizer_Stage3)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed steps, as it was given."""
    base: torch.optim.Optimizer = engine.optimizer.optimizer if _is_sharded(engine) else engine.optimizer
    return base


def parts_of_matrices(engine: Any, *, data: Group) -> dict[Tensor, list[MatrixPart]]:
    """Return what this rank holds of blocks' weight matrices, by the tensors that the optimizer steps."""
    return {
        master: list(_parts(engine, master, parameters, data=data))
        for master, parameters in _masters(engine)
        if shard_of(parameters[0]).is_matrix
    }


def _parts(engine: Any, master: Tensor, parameters: list[nn.Parameter], *, data: Group) -> list[MatrixPart]:
    shards = [shard_of(parameter) for parameter in parameters]
    if not _is_sharded(engine):
        return joined_then_cut(shards, [parameter.numel() for parameter in parameters], size=len(master.view(-1)))
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        held: list[Any] = [parameter.ds_tensor for parameter in parameters]  # type: ignore[attr-defined]
        sizes = [(parameter.ds_numel, part.ds_numel) for parameter, part in zip(parameters, held, strict=True)]  # type: ignore[attr-defined]
        return cut_then_joined(shards, sizes, ranks=data.size)
    numels = [parameter.numel() for parameter in parameters]
    return joined_then_cut(shards, numels, size=len(master), rank=data.rank, ranks=data.size)


def _moments(row: OptimizerChoice, parameters: list[nn.Parameter]) -> tuple[str, ...]:
    return row.moments_of(is_matrix=shard_of(parameters[0]).is_matrix)


def _masters(engine: Any) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """Return the tensors that the optimizer steps, each with the parameters that it is part of.

    They are flat fp32 partitions under ZeRO, else the parameters.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))
    if isinstance(optimizer, BF16_Optimizer):
        return list(zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True))
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))
    return [(parameter, [parameter]) for group in optimizer.param_groups for parameter in group["params"]]


def _name(parameter: nn.Parameter) -> str:
    shard = getattr(parameter, "shard", None)
    return shard.name if isinstance(shard, Shard) else "an undeclared parameter"
