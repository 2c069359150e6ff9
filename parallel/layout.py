"""Arithmetic of a layout: how many ranks share what. Imports no torch."""

from dataclasses import dataclass

from configs.errors import InputError
from configs.schema import RunConfig

REDUCE_BUCKET = 50_000_000  # elements of the buffer that DeepSpeed allocates; its default is ten times as many


@dataclass(frozen=True)
class Layout:
    """How the ranks are split into tensor, pipeline and data axes; tensor varies fastest."""

    tensor: int
    pipeline: int
    data: int
    zero: int
    micro_batches: int
    offload: str = "none"

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
        if train.global_batch % (train.micro_batch * data):
            raise InputError(
                f"train.global_batch must be a multiple of train.micro_batch x data ranks ({train.micro_batch} x "
                f"{data} = {train.micro_batch * data}), got {train.global_batch}: change one of them"
            )
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            data=data,
            zero=parallel.zero,
            micro_batches=train.global_batch // (train.micro_batch * data),
            offload=parallel.offload,
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


def stage_bounds(blocks: int, *, stages: int) -> tuple[int, ...]:
    """Return each stage's first block, and the end: 25 blocks on 2 stages are (0, 13, 25).

    The first stages take the remainder, because the last stage also computes the logits.
    """
    each, odd = divmod(blocks, stages)
    sizes = [each + (stage < odd) for stage in range(stages)]
    return tuple(sum(sizes[:stage]) for stage in range(stages + 1))


def padded_vocabulary(vocab_size: int, *, tensor: int) -> int:
    """Return the embedding's number of rows, rounded up to divide evenly over the tensor ranks."""
    return -(-vocab_size // tensor) * tensor
