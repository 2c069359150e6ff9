"""Estimate the bytes that training holds on a rank, by what they are for. Imports no torch.

A sum over the shards of each pipeline stage, plus what the layers keep for the backward pass. docs/memory.md has the
formulas and how right they were.
"""

from dataclasses import asdict, dataclass
from math import prod

from configs.backends import backend_of
from configs.choices import OPTIMIZERS
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.schema import RunConfig
from parallel.layout import REDUCE_BUCKET, Layout, stage_bounds
from parallel.parameter import Shard, padded_shape
from training.families.table import shards_of

FP32 = 4
GATHERED_BY_ZERO_3 = 1_000_000_000  # elements that DeepSpeed keeps gathered, by default, where they are needed again
GPU_OVERHEAD, CPU_OVERHEAD = 1_500_000_000, 700_000_000
ALLOCATOR_SHARE = 0.03  # of what torch holds on a GPU: blocks that are free, but of the wrong size


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the largest rank of one pipeline stage.

    Attributes:
        weights: Of the forward pass.
        gradients: Those of one micro-batch and their sum, as far as they are held beside all activations.
        optimizer: Master weights and moments.
        buffers: What DeepSpeed sends from, logits that its pipeline keeps, and what the optimizer's step needs more
            than the activations before it.
        activations: What all layers keep for the backward pass, of all micro-batches in flight.
        head: Logits and loss; on other stages than the last, the backward pass of one block.
        overhead: Python, torch, CUDA and NCCL, and free blocks of the wrong size.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    head: int
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
        stages: By stage.
        offloaded: Bytes of optimizer state that each rank keeps in the machine's memory instead of its GPU's.
    """

    stages: tuple[StageMemory, ...]
    offloaded: int

    @property
    def largest(self) -> int:
        """Bytes of the largest rank."""
        return max(stage.total for stage in self.stages)


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
    for stage in range(layout.pipeline):
        state = _State.of(config, layout, stage, bucket=bucket)
        activations, head = _activations(config, layout, stage, on_gpu=on_gpu)
        # Later gradients come, are sent and used by the optimizer, when the activations are gone.
        later = max(0, state.gradients + state.step - (state.early_gradients + activations + head))
        gradients = min(state.gradients, state.early_gradients + later)
        parts = {
            "weights": state.weights,
            "gradients": gradients,
            "optimizer": 0 if offloads else state.optimizer,
            "buffers": state.buffers + state.early_gradients + later - gradients,
            "activations": activations,
            "head": head,
        }
        if stage == layout.pipeline - 1:
            parts["buffers"] += _old_logits(config, layout)
        overhead = GPU_OVERHEAD + int(ALLOCATOR_SHARE * sum(parts.values())) if on_gpu else CPU_OVERHEAD
        stages.append(StageMemory(**parts, overhead=overhead))
        offloaded = max(offloaded, state.optimizer if offloads else 0)
    return MemoryEstimate(tuple(stages), offloaded)


def _sizes(config: RunConfig, layout: Layout, stage: int) -> list[int]:
    """Return the elements of each parameter that a rank of a stage holds, with padding."""
    shards = shards_of(config.model, vocab_size=config.data.vocab_size)
    held = (shard for shard in shards.values() if _is_on(shard, stage, config=config, layout=layout))
    return [prod(padded_shape(shard, tensor_size=layout.tensor)) for shard in held]


def _is_on(shard: Shard, stage: int, *, config: RunConfig, layout: Layout) -> bool:
    where, _, rest = shard.name.partition(".")
    first, last = stage == 0, stage == layout.pipeline - 1
    if where == "blocks":
        bounds = stage_bounds(config.model.layers, stages=layout.pipeline)
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
        weights: Of the forward pass.
        gradients: When the backward pass has ended.
        early_gradients: While all activations are still held.
        optimizer: Master weights and moments.
        buffers: Held all the time.
        step: Held only when the backward pass has ended.
    """

    weights: int
    gradients: int
    early_gradients: int
    optimizer: int
    buffers: int
    step: int

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, stage: int, *, bucket: int) -> "_State":
        """Return the state of a stage's rank, as DeepSpeed keeps it at each ZeRO stage."""
        precision, zero, sizes = PRECISIONS[config.train.precision], layout.zero, _sizes(config, layout, stage)
        width, count, largest = precision.width, sum(sizes), max(sizes)
        share = -(-count // layout.data) if zero else count
        optimizer = share * FP32 * (len(OPTIMIZERS[config.train.optimizer].moments) + (zero > 0))
        # torch's AdamW allocates the square root of a moment, and what it divides by.
        step = 2 * FP32 * share
        # Gradients of one micro-batch, and a sum of them that is kept apart.
        each, summed, buffers, weights = width * count, 0, 0, width * count
        if zero == 1 and precision.master_weights:  # DeepSpeed's BF16_Optimizer
            summed, buffers, step = FP32 * count, FP32 * largest, max(step, FP32 * count)
        elif zero == 0:
            step = max(step, FP32 * count)
        elif zero == 1:
            step += FP32 * (share + bucket)
        else:
            each, summed, buffers = width * largest, FP32 * share, width * bucket
        if zero == 3:
            weights, buffers = width * share, buffers + width * min(count, GATHERED_BY_ZERO_3)
        # While all activations are held, gradients of micro-batches before are there, if there were any.
        accumulates = layout.micro_batches > _in_flight(layout, stage)
        early = (each if accumulates and zero < 2 else 0) + (0 if zero == 2 and not accumulates else summed)
        return cls(weights, each + summed, early, optimizer, buffers, step)


def _in_flight(layout: Layout, stage: int) -> int:
    """Return the micro-batches whose activations a stage holds: 1F1B gives stages further to the front more."""
    return min(layout.pipeline - stage, layout.micro_batches)


def _activations(config: RunConfig, layout: Layout, stage: int, *, on_gpu: bool) -> tuple[int, int]:
    """Return the bytes that a stage keeps for the backward pass, and those that its head or a block needs on top."""
    model, train = config.model, config.train
    bounds = stage_bounds(model.layers, stages=layout.pipeline)
    blocks, first, last = bounds[stage + 1] - bounds[stage], stage == 0, stage == layout.pipeline - 1
    tokens = train.micro_batch * config.data.sequence_length
    width = PRECISIONS[train.precision].width
    state = width * tokens * model.hidden  # one [batch, seq, hidden]
    block = _block(config, layout, on_gpu=on_gpu)
    kept = blocks * (state if train.recompute else block)
    # The embedding's norm and dropout keep a state each, so do the last norm and the head.
    kept += state * first * (2 if model.dropout else 1) + 2 * state * last
    kept += state * (layout.pipeline > 1)  # the output of the stage
    backward = state + 2 * width * tokens * model.inner // layout.tensor
    if train.recompute:
        backward += block - state
    held = _in_flight(layout, stage) * kept + _bias_strip(config, layout)
    return held, max(backward, _head(config, layout) if last else 0)


def _logits(config: RunConfig, layout: Layout) -> int:
    """Return the elements of a rank's logits of one micro-batch."""
    shard = shards_of(config.model, vocab_size=config.data.vocab_size)["embedding.word.weight"]
    columns = padded_shape(shard, tensor_size=layout.tensor)[0]
    return config.train.micro_batch * config.data.sequence_length * columns


def _head(config: RunConfig, layout: Layout) -> int:
    """Return the bytes of logits and loss, and of the gradients of the head's input and weight."""
    width, tokens = PRECISIONS[config.train.precision].width, config.train.micro_batch * config.data.sequence_length
    logits = _logits(config, layout)
    # The loss overwrites logits that are fp32 already.
    in_fp32 = FP32 * logits if width < FP32 else 0
    return width * logits + in_fp32 + width * config.model.hidden * (tokens + logits // tokens)


def _old_logits(config: RunConfig, layout: Layout) -> int:
    """Return the bytes of the logits of the two micro-batches before, which DeepSpeed's pipeline keeps."""
    kept = min(2, layout.micro_batches) if layout.pipeline > 1 else 0
    return kept * PRECISIONS[config.train.precision].width * _logits(config, layout)


def _bias_strip(config: RunConfig, layout: Layout) -> int:
    """Return the bytes of the bias that all layers share."""
    model, seq = config.model, config.data.sequence_length
    rows = backend_of(model.attention).query_block if POSITIONS[model.position].has_bias else 0
    return FP32 * model.heads // layout.tensor * min(seq, rows) * seq


def _block(config: RunConfig, layout: Layout, *, on_gpu: bool) -> int:
    """Return the bytes that one block keeps of one micro-batch for the backward pass."""
    model, train, seq = config.model, config.train, config.data.sequence_length
    width, tokens = PRECISIONS[train.precision].width, train.micro_batch * seq
    backend, position = backend_of(model.attention), POSITIONS[model.position]
    whole = 4 * width * model.hidden  # inputs of both norms and of the linears after them
    # queries, keys, values, the attention's output; input and output of the GELU
    split = width * (4 * model.hidden + 2 * model.inner)
    if position.rotates:
        split += 2 * width * model.hidden
    if position.has_bias and 0 < backend.query_block < seq:
        split += width * model.hidden
    if backend.keeps_scores:
        split += 3 * FP32 * model.hidden + FP32 * model.heads * seq
    split += FP32 * model.heads  # the sum of each row of weights
    if model.dropout:
        whole += 2 * model.hidden * (1 if on_gpu else width)
    return tokens * (whole + split // layout.tensor)
