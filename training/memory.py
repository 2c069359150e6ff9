"""Estimate the bytes that training holds on a rank, by what they are for. Imports no torch.

A sum over the shards of each pipeline stage, plus what the layers keep for the backward pass. docs/memory.md has the
formulas and how accurate they were.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

from configs.choices import OPTIMIZERS
from configs.precisions import PRECISIONS
from configs.schema import RunConfig
from parallel.layout import REDUCE_BUCKET, Layout, effective_zero
from parallel.parameter import Shard, padded_shape
from training.families.table import shards_of
from training.memory_activations import (
    FP32,
    Activations,
    block_bounds,
    in_flight,
    stage_activations,
    validation_states,
)

REDUCED_AT_ONCE = 500_000_000  # elements that DeepSpeed copies to sum them over data ranks without ZeRO
GATHERED_BY_ZERO_3 = 1_000_000_000  # elements that DeepSpeed keeps gathered, by default, where they are needed again
GPU_OVERHEAD, CPU_OVERHEAD = 1_500_000_000, 700_000_000
ALLOCATOR_SHARE = 0.03  # of what torch holds on a GPU: blocks that are free, but of the wrong size


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the largest rank of one pipeline stage.

    Attributes:
        weights: Weights of the forward pass.
        gradients: Gradients of one micro-batch and their sum, as far as they are held together with all activations.
        optimizer: Master weights and moments.
        buffers: What DeepSpeed sends from, and what the optimizer's step needs more than the activations before it; on
            a CPU also the copies of a save in the background.
        activations: What all layers keep for the backward pass, of all micro-batches in flight.
        head: A chunk of logits, and the gradients of the head's input and weight; or, if it needs more, the backward
            pass of one block.
        validation: What a validation at the longest length needs more than a step does.
        overhead: Python, torch, CUDA and NCCL, and free blocks of the wrong size.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    head: int
    validation: int
    overhead: int

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Return each part and the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each pipeline stage's largest rank.

    Attributes:
        stages: Memory of each stage.
        offloaded: Bytes of optimizer state that each rank keeps in the machine's memory instead of its GPU's.
        copies: Bytes that a rank copies from its GPU to the machine's memory for a save in the background.
        shared_copies: The same of all data ranks together, which share what they save.
        layout: How the ranks are split into axes.
    """

    stages: tuple[StageMemory, ...]
    offloaded: int
    copies: int
    shared_copies: int
    layout: Layout

    @property
    def largest(self) -> int:
        """Bytes of the largest rank."""
        return max(stage.total for stage in self.stages)

    def host(self, *, ranks: int) -> int:
        """Return the bytes of a machine's memory that its ranks need beside their GPUs'.

        Args:
            ranks: Ranks of the machine.
        """
        data = min(self.layout.data, max(1, ranks // self.layout.tensor))  # that share; ranks count tensor ranks first
        return ranks * self.offloaded + -(-ranks // data) * min(self.shared_copies, data * self.copies)


def estimate_memory(config: RunConfig, *, layout: Layout, on_gpu: bool, bucket: int = REDUCE_BUCKET) -> MemoryEstimate:
    """Return what training will hold.

    Args:
        config: The run.
        layout: How the ranks are split into axes.
        on_gpu: Whether the ranks have GPUs.
        bucket: Elements of DeepSpeed's buffer.
    """
    offloads = on_gpu and layout.offload == "cpu"
    stages, offloaded = [], 0
    saved: tuple[int, ...] = (0,)
    for stage in range(layout.pipeline):
        state = _State.of(config, layout, stage, on_gpu=on_gpu, bucket=bucket)
        activations = stage_activations(config, layout, stage, on_gpu=on_gpu)
        copies = 0 if on_gpu else _copies(layout, state.saved)
        parts = _parts(state, activations, offloads=offloads, copies=copies)
        validating = parts["weights"] + parts["optimizer"] + state.buffers + state.held_gradients + copies
        validating += validation_states(config, layout, stage, on_gpu=on_gpu)
        parts["validation"] = max(0, validating - sum(parts.values()))
        overhead = GPU_OVERHEAD + int(ALLOCATOR_SHARE * sum(parts.values())) if on_gpu else CPU_OVERHEAD
        stages.append(StageMemory(**parts, overhead=overhead))
        offloaded = max(offloaded, state.optimizer if offloads else 0)
        saved = max(saved, state.saved if on_gpu else (0,), key=sum)
    return MemoryEstimate(tuple(stages), offloaded, _copies(layout, saved), sum(saved), layout)


def _copies(layout: Layout, saved: tuple[int, ...]) -> int:
    """Return what the data rank that saves most copies, of the bytes of each kind, which the data ranks share."""
    return max(sum(saved[rank :: layout.data]) for rank in range(layout.data))


def evaluation_weights(config: RunConfig) -> int:
    """Return the bytes of the weights on the largest rank of `evaluate`, in fp32, its default precision."""
    split = config.evaluate
    layout = Layout(tensor=split.tensor, pipeline=split.pipeline, data=1, zero=0, micro_batches=1)
    return max(FP32 * sum(_sizes(config, layout, stage).values()) for stage in range(layout.pipeline))


def _parts(state: "_State", activations: Activations, *, offloads: bool, copies: int) -> dict[str, int]:
    # Later gradients come, are sent and used by the optimizer, when the activations are gone.
    before = state.early_gradients + activations.kept + activations.working
    later = max(0, state.gradients + state.step - before)
    gradients = min(state.gradients, state.early_gradients + later)
    return {
        "weights": state.weights,
        "gradients": gradients,
        "optimizer": 0 if offloads else state.optimizer,
        "buffers": state.buffers + state.early_gradients + later - gradients + copies,
        "activations": activations.kept,
        "head": activations.working,
    }


def _sizes(config: RunConfig, layout: Layout, stage: int) -> dict[Shard, int]:
    """Return the elements that a rank of a stage holds of each of its parameters, with padding."""
    shards = shards_of(config.model, vocab_size=config.data.vocab_size)
    bounds = block_bounds(config, layout)  # once: a search over the layers
    held = (shard for shard in shards.values() if _is_on(shard, stage, bounds=bounds))
    return {shard: prod(padded_shape(shard, tensor_size=layout.tensor)) for shard in held}


def _sizes_of_kinds(config: RunConfig, sizes: dict[Shard, int]) -> list[int]:
    """Return the elements of each kind of state, the weights first, of parameters with these numbers of elements."""
    row = OPTIMIZERS[config.train.optimizer]
    kept = {shard: row.kinds_of(is_matrix=shard.is_matrix) for shard in sizes}
    return [sum(size for shard, size in sizes.items() if kind in kept[shard]) for kind in row.state_kinds]


def _on_whole_matrices(sizes: dict[Shard, int], layout: Layout, *, share: float) -> int:
    """Return the bytes with which an optimizer works on whole matrices, of which each data rank holds a share."""
    matrices = {shard: size for shard, size in sizes.items() if shard.is_matrix}
    exchanged = 2 * round(share * sum(matrices.values())) if layout.tensor > 1 or share < 1 else 0
    return FP32 * (exchanged + 4 * layout.tensor * max(matrices.values()))


def _is_on(shard: Shard, stage: int, *, bounds: Sequence[int]) -> bool:
    where, _, rest = shard.name.partition(".")
    first, last = stage == 0, stage == len(bounds) - 2
    if where == "blocks":
        return bounds[stage] <= int(rest.partition(".")[0]) < bounds[stage + 1]
    if where == "positions":
        return True
    if where == "embedding":
        return first or (last and shard.tied)
    return last


@dataclass(frozen=True)
class _State:
    """Bytes that do not depend on the batch.

    Attributes:
        weights: Weights of the forward pass.
        gradients: When the backward pass has ended.
        early_gradients: While all activations are still held.
        held_gradients: Between two steps.
        optimizer: Master weights and moments.
        buffers: Held all the time.
        step: Held only when the backward pass has ended.
        saved: Weights and moments, each kind by itself, copied for a save in the background; none without.
    """

    weights: int
    gradients: int
    early_gradients: int
    held_gradients: int
    optimizer: int
    buffers: int
    step: int
    saved: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, stage: int, *, on_gpu: bool, bucket: int) -> "_State":
        """Return the state of a stage's rank, as DeepSpeed keeps it at each ZeRO stage."""
        precision, sizes = PRECISIONS[config.train.precision], _sizes(config, layout, stage)
        kinds, zero = _sizes_of_kinds(config, sizes), effective_zero(config.train, layout=layout)
        width, count, largest = precision.width, sum(sizes.values()), max(sizes.values())
        share = -(-count // layout.data) if zero else count
        optimizer = FP32 * (-(-sum(kinds[1:]) * share // count) + (share if zero else 0))
        flat = min(count, REDUCED_AT_ONCE) if layout.data > 1 else 0
        # Gradients of one micro-batch, and a sum of them that is kept apart.
        each, summed, buffers, weights, step = width * count, 0, 0, width * count, 0
        # DeepSpeed's BF16_Optimizer
        in_place = zero == 1 and precision.dtype == "bfloat16" and layout.offload == "none"
        if in_place:  # of the micro-batch only the embedding's, once in each precision
            each, summed, step = 0, FP32 * count, (width + FP32) * largest
            if layout.data > 1 and not on_gpu:  # gloo sums over data ranks in a copy
                step = max(step, summed)
        elif zero == 0:
            step = FP32 * flat
        elif zero == 1:
            if precision.master_weights:  # added to an fp32 sum as they are computed
                each, summed = width * largest, FP32 * count
            step = FP32 * (share + bucket)
        else:
            # With several data ranks a GPU fills one bucket while the other is on its way.
            each, summed = width * largest, FP32 * share
            buffers = width * bucket * (2 if on_gpu and layout.data > 1 else 1)
        if layout.offload == "cpu" and zero in (1, 2):  # the gradient that is on its way, on both sides of it
            buffers += width * largest * (1 if on_gpu else 2)
        if zero == 3:
            weights, buffers = width * share, buffers + width * min(count, GATHERED_BY_ZERO_3)
        # While all activations are held, gradients of micro-batches before are there, if there were any.
        accumulates = layout.micro_batches > in_flight(layout, stage)
        early = (each if accumulates and zero < 2 else 0) + (summed if accumulates or in_place or zero == 3 else 0)
        if layout.shares_matrices:
            exchange = _on_whole_matrices(sizes, layout, share=share / count)
            step = max(step, exchange) if in_place else step + exchange
        held = summed if in_place else 0
        saved = tuple(FP32 * kind for kind in kinds) if config.checkpoint.background else (0,)
        return cls(weights, each + summed, early, held, optimizer, buffers, step, saved)
