"""Estimate the bytes that the layers of a pipeline stage keep for the backward pass. Imports no torch."""

from dataclasses import dataclass

from configs.backends import Backend, backend_of, keeps_only_states
from configs.choices import FAMILIES
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.schema import RunConfig
from parallel.compilers import is_compiled
from parallel.layout import HEAD_CHUNK_BYTES, Layout, head_blocks, padded_vocabulary, stage_bounds

FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank.

    Attributes:
        kept: What all layers keep for the backward pass, of all micro-batches in flight.
        working: What the head, or the backward pass of one block, needs on top.
    """

    kept: int
    working: int


def block_bounds(config: RunConfig, layout: Layout) -> tuple[int, ...]:
    """Return each stage's first block, and the end."""
    head = head_blocks(config.model, vocab_size=config.data.vocab_size, length=config.data.sequence_length)
    return stage_bounds(config.model.layers, stages=layout.pipeline, head=head)


def in_flight(layout: Layout, stage: int) -> int:
    """Return the micro-batches whose activations a stage holds: 1F1B gives stages further to the front more."""
    return min(layout.pipeline - stage, layout.micro_batches)


def stage_activations(config: RunConfig, layout: Layout, stage: int, *, on_gpu: bool) -> Activations:
    """Return what a stage keeps for the backward pass, and what it needs on top.

    Args:
        config: The run.
        layout: How the ranks are split into axes.
        stage: The pipeline stage.
        on_gpu: Whether the ranks have GPUs.
    """
    model, train, width = config.model, config.train, PRECISIONS[config.train.precision].width
    bounds = block_bounds(config, layout)
    blocks, first, last = bounds[stage + 1] - bounds[stage], stage == 0, stage == layout.pipeline - 1
    whole_state = width * train.micro_batch * config.data.sequence_length * model.hidden
    state = whole_state // _parts(config, layout)  # a rank's states between the linears
    block, again = _block(config, layout, on_gpu=on_gpu)
    kept = blocks * block
    # The embedding's norm keeps a state, and its dropout; so do the last norm and the head.
    kept += state * first * (2 if model.dropout else 1) + 2 * state * last
    kept += state * (layout.pipeline > 1)  # the output of the stage
    held = in_flight(layout, stage) * kept
    if POSITIONS[model.position].bias != "table":
        held += _strip(config, layout, on_gpu=on_gpu)  # which all layers share
    if last and layout.pipeline > 1:
        held += min(2, layout.micro_batches) * state  # DeepSpeed keeps the last layer's output of micro-batches before
    if _parts(config, layout) > 1:
        held += whole_state  # megatron's buffer for the inputs of column linears, gathered
    backward = state + _matrices(config) * whole_state * model.inner // model.hidden // layout.tensor + again
    return Activations(held, max(backward, _head(config, layout, on_gpu=on_gpu) if last else 0))


def validation_states(config: RunConfig, layout: Layout, stage: int, *, on_gpu: bool) -> int:
    """Return the bytes of states and logits of a stage in a validation at the run's longest length; 0 without one.

    Nothing is kept for a backward pass: the largest of attention, the feed-forward of one block, and the head.
    """
    if not config.validation_lengths:
        return 0
    model, train, width = config.model, config.train, PRECISIONS[config.train.precision].width
    length = max(config.validation_lengths)
    batch = max(1, train.micro_batch * config.data.sequence_length // length)
    data = config.data.model_copy(update={"sequence_length": length})
    longest = config.model_copy(update={"data": data, "train": train.model_copy(update={"micro_batch": batch})})
    backend, last = _backend(config, on_gpu=on_gpu), stage == layout.pipeline - 1
    whole, parts, tensor = width * batch * length * model.hidden, _parts(config, layout), layout.tensor
    # input and norm; queries, keys, values, the output, and what they are rotated to
    attention = 2 * whole // parts + (6 if POSITIONS[model.position].rotates else 4) * whole // tensor
    attention += _strip(longest, layout, on_gpu=on_gpu)
    if backend.keeps_scores:  # its mask, the scores and their softmax
        attention += 3 * FP32 * batch * length * length * model.heads // tensor
    # and the residual stream, the outputs of both parts, and both sides of the activation
    feed_forward = 5 * whole // parts + (4 * whole + _matrices(config) * whole * model.inner // model.hidden) // tensor
    logits = _chunk(longest, layout) * (width + FP32 * (1 if width == FP32 else 2))
    head = whole // parts + (whole if parts > 1 else 0) + logits
    # DeepSpeed keeps what it receives and sends of two micro-batches; megatron gathered inputs of column linears
    between = (4 if stage else 2) * whole // parts if layout.pipeline > 1 else 0
    return max(attention, feed_forward, head if last else 0) + between + (whole if parts > 1 else 0)


def _matrices(config: RunConfig) -> int:
    """Return the matrices of a feed-forward, which are also the tensors on both sides of its activation."""
    return FAMILIES[config.model.family].feed_forward_matrices


def _parts(config: RunConfig, layout: Layout) -> int:
    """Return into how many parts the tensor ranks split a sequence between the linears."""
    return layout.tensor if config.parallel.sequence else 1


def _head(config: RunConfig, layout: Layout, *, on_gpu: bool) -> int:
    """Return the bytes of a chunk of logits, and of the gradients of the head's input and weight."""
    train, hidden, precision = config.train, config.model.hidden, PRECISIONS[config.train.precision]
    tokens, width = train.micro_batch * config.data.sequence_length, precision.width
    element = 2 * width  # logits and, of the same size, their gradient
    if width < FP32 and not _is_compiled(config, on_gpu=on_gpu):  # log probabilities in fp32 are there too
        element += FP32
        if not (on_gpu and precision.dtype == "float16"):  # and before the gradient, what they are computed from
            element += FP32 - width
    states = width * tokens * hidden * (2 if _parts(config, layout) > 1 else 1)
    return element * _chunk(config, layout) + states + FP32 * _columns(config, layout) * hidden


def _chunk(config: RunConfig, layout: Layout) -> int:
    """Return the elements of a chunk of logits."""
    most = max(1, HEAD_CHUNK_BYTES // (_columns(config, layout) * PRECISIONS[config.train.precision].width))
    tokens = config.train.micro_batch * config.data.sequence_length
    return _columns(config, layout) * min(tokens, 1 << (most.bit_length() - 1))


def _columns(config: RunConfig, layout: Layout) -> int:
    return padded_vocabulary(config.data.vocab_size, tensor=layout.tensor) // layout.tensor


def _is_compiled(config: RunConfig, *, on_gpu: bool) -> bool:
    return is_compiled(config.train.compile, device="cuda" if on_gpu else "cpu")


def _backend(config: RunConfig, *, on_gpu: bool) -> Backend:
    """Return the attention backend of a run, on ranks with GPUs or without."""
    model = config.model
    return backend_of(
        model.attention,
        device="cuda" if on_gpu else "cpu",
        position=model.position,
        precision=config.train.precision,
        head_dim=model.head_dim,
        documents=config.data.mask_documents,
    )


def _strip(config: RunConfig, layout: Layout, *, on_gpu: bool) -> int:
    """Return the bytes of the strip of mask that an attention reads, of each head if there is a bias."""
    model, seq, backend = config.model, config.data.sequence_length, _backend(config, on_gpu=on_gpu)
    rows = min(seq, backend.query_block) if _has_mask(config) else 0
    heads = model.heads // layout.tensor if POSITIONS[model.position].has_bias else 1
    columns = seq if model.window is None else min(seq, rows + model.window)
    if POSITIONS[model.position].slopes is not None and model.window is None and not on_gpu and rows:
        # of far keys a line, and one row of bias
        return FP32 * heads * (rows * min(seq, max(rows, backend.nearest)) + seq)
    if POSITIONS[model.position].bias == "table":
        columns += rows  # it is cut from one that is wider
    return (PRECISIONS[config.train.precision].width if on_gpu else FP32) * heads * rows * columns


def _has_mask(config: RunConfig) -> bool:
    """Return whether attention needs a mask besides the causal one: a bias, or a window shorter than the sequence."""
    return config.model.window_hides(config.data.sequence_length) or POSITIONS[config.model.position].has_bias


def _joins_blocks(config: RunConfig, backend: Backend, *, on_gpu: bool) -> bool:
    """Return whether attention keeps its output twice: of each block of queries, and joined."""
    position = POSITIONS[config.model.position]
    if position.entries_per_head or not (on_gpu or position.bias == "table"):
        return False  # a block with a learned bias is recomputed; on a CPU the others write into one output
    return _has_mask(config) and 0 < backend.query_block < config.data.sequence_length


def _block(config: RunConfig, layout: Layout, *, on_gpu: bool) -> tuple[int, int]:
    """Return the bytes that one block keeps of one micro-batch, and those that its backward pass computes again."""
    model, train, seq = config.model, config.train, config.data.sequence_length
    width, tokens = PRECISIONS[train.precision].width, train.micro_batch * seq
    backend, position = _backend(config, on_gpu=on_gpu), POSITIONS[model.position]
    hidden, inner, parts = width * model.hidden, width * model.inner, _parts(config, layout)
    # What a softmax keeps besides queries, keys and values: its output, or its sums and what the method adds.
    attention = hidden + FP32 * model.heads
    if position.rotates and not _is_compiled(config, on_gpu=on_gpu):
        attention += 2 * hidden  # what they were rotated from is kept too: the values are a view of the whole
    if _joins_blocks(config, backend, on_gpu=on_gpu):
        attention += hidden
    if backend.keeps_scores:
        attention += 3 * (FP32 - width) * model.hidden + FP32 * model.heads * seq
    # Inputs of both norms and of the linears after them; queries, keys, values; input and output of the activation.
    whole, split = 4 * hidden, 3 * hidden + attention + _matrices(config) * inner
    if model.dropout:
        whole += 2 * model.hidden * (1 if on_gpu else width)
    gathered = hidden - hidden // parts if _matrices(config) > 2 else 0  # a pair of linears keeps all of its input
    everything = tokens * (whole // parts + split // layout.tensor + gathered)
    if position.bias == "table":
        everything += _strip(config, layout, on_gpu=on_gpu)
    if train.recompute is False:
        return everything, 0
    if train.recompute is True:
        kept = tokens * hidden // parts
    else:  # the block's input, attention's output after its linear; queries, keys, values; input of the activation
        states_only = keeps_only_states(model.attention, position=model.position, head_dim=model.head_dim)
        split = 3 * hidden + (attention if states_only else 0) + (_matrices(config) - 1) * inner
        kept = tokens * ((whole - 2 * hidden) // parts + split // layout.tensor)
        if gathered:
            kept += tokens * hidden
    return kept, everything - kept
