"""Arithmetic of a layout: how many ranks share what. Imports no torch."""

from dataclasses import dataclass
from itertools import accumulate

from configs.choices import FAMILIES, OPTIMIZERS
from configs.errors import InputError
from configs.precisions import PRECISIONS
from configs.schema import Model, RunConfig, Train
from configs.step_sizes import batches_of

REDUCE_BUCKET = 50_000_000  # elements of the buffer that DeepSpeed allocates; its default is ten times as many
HEAD_CHUNK_BYTES = 2**28  # of a chunk's logits on one rank, in the type of the forward pass


@dataclass(frozen=True)
class Layout:
    """How the ranks are split into tensor, pipeline and data axes; tensor varies fastest.

    With `shares_matrices` the ranks of a stage exchange parts of matrices in each step, as Muon does.
    """

    tensor: int
    pipeline: int
    data: int
    zero: int
    micro_batches: int
    offload: str = "none"
    overlap: bool = False
    shares_matrices: bool = False

    @classmethod
    def of(cls, config: RunConfig, *, world_size: int) -> "Layout":
        """Return the layout of a run on `world_size` ranks.

        Raises:
            InputError: the ranks do not make whole model copies, or the batch does not divide over them.
        """
        parallel, train = config.parallel, config.train
        model_ranks = parallel.tensor * parallel.pipeline
        if world_size < 1 or world_size % model_ranks:
            raise InputError(
                f"ranks must be a multiple of parallel.tensor x parallel.pipeline ({parallel.tensor} x "
                f"{parallel.pipeline} = {model_ranks}), got {world_size}: start {model_ranks} or "
                f"{2 * model_ranks} ranks, or change parallel"
            )
        data = world_size // model_ranks
        for batch in reversed(batches_of(train)):
            if batch % (train.micro_batch * data):
                key = "train.global_batch" if batch == train.global_batch else "each batch of train.batch_warmup"
                raise InputError(
                    f"{key} must be a multiple of train.micro_batch x data ranks ({train.micro_batch} x "
                    f"{data} = {train.micro_batch * data}), got {batch}: change one of them"
                )
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            data=data,
            zero=parallel.zero,
            micro_batches=train.global_batch // (train.micro_batch * data),
            offload=parallel.offload,
            overlap=parallel.overlap,
            shares_matrices=OPTIMIZERS[train.optimizer].moments_of_matrices is not None,
        )

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.tensor * self.pipeline * self.data

    def place_of(self, rank: int) -> str:
        """Return a rank's place on each axis in words: `tensor rank 1, pipeline rank 0, data rank 0`."""
        group, tensor = divmod(rank, self.tensor)  # tensor varies fastest, then data
        stage, data = divmod(group, self.data)
        return f"tensor rank {tensor}, pipeline rank {stage}, data rank {data}"

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}, ZeRO-{self.zero}"


def effective_zero(train: Train, *, layout: Layout) -> int:
    """Return the ZeRO stage that DeepSpeed runs at.

    One data rank has nothing to partition. Without ZeRO, fp32 needs no copies of weights and gradients; 16 bits need
    fp32 weights, and ZeRO 1 is what keeps them with the fewest buffers.
    """
    if layout.data > 1 or layout.zero == 3 or layout.offload != "none":
        return layout.zero
    return 1 if PRECISIONS[train.precision].master_weights else 0


def head_blocks(model: Model, *, vocab_size: int, length: int) -> float:
    """Return how many blocks the head is worth, by the multiplications of a token.

    A block multiplies by its weights, 4 hidden^2 + 2 hidden x inner (3 with a gate), and with length / 2 keys and
    values; the head by hidden x vocab_size. The embedding multiplies nothing.
    """
    matrices = FAMILIES[model.family].feed_forward_matrices
    return vocab_size / (4 * model.hidden + matrices * model.inner + length)


def stage_bounds(blocks: int, *, stages: int, head: float) -> tuple[int, ...]:
    """Return each stage's first block, and the end, so that the largest stage is as small as it can be.

    25 blocks on 3 stages are (0, 9, 18, 25), with a head worth 2 blocks on the last stage. Each stage has a block. The
    first stages take fewer where blocks do not divide: they hold the activations of more micro-batches.
    """
    if stages == 1:
        return 0, blocks

    def largest(last: int) -> tuple[float, int]:
        return max(-(-(blocks - last) // (stages - 1)), last + head), -last

    last = min(range(1, blocks - stages + 2), key=largest)
    each, odd = divmod(blocks - last, stages - 1)
    sizes = [*(each + (stage >= stages - 1 - odd) for stage in range(stages - 1)), last]
    return tuple(accumulate(sizes, initial=0))


def padded_vocabulary(vocab_size: int, *, tensor: int) -> int:
    """Return the embedding's number of rows, rounded up to divide evenly over the tensor ranks."""
    return -(-vocab_size // tensor) * tensor
