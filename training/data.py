"""Open a run's data on each rank: the loader of its samples, and its held-out samples."""

from functools import partial

from configs.schema import RunConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Prepared
from data_pipeline.samples import Samples, open_samples
from parallel.axes import Groups
from parallel.collectives import broadcast_from_first


def open_data(config: RunConfig, *, prepared: Prepared, groups: Groups) -> tuple[Loader, Samples | None]:
    """Return the run's loader, and the held-out samples if the run validates; every rank must call it.

    Raises:
        InputError: the data does not fit the run; raised on every rank.
        MachineError: the index of its samples cannot be written; raised on every rank.
    """
    open_run_samples = partial(_open_on_first_rank_first, config, prepared=prepared, groups=groups)
    loader = Loader(
        open_run_samples(config.data.sequence_length, held_out=False),
        seed=config.run.seed,
        micro_batch=config.train.micro_batch,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
    )
    longest = max(config.validation_lengths, default=None)
    return loader, None if longest is None else open_run_samples(longest, held_out=True)


def _open_on_first_rank_first(
    config: RunConfig, sequence_length: int, *, prepared: Prepared, groups: Groups, held_out: bool
) -> Samples:
    """Open the samples on rank 0 first: it builds their index, which the other ranks then find."""
    open_now = partial(
        open_samples,
        prepared,
        sequence_length=sequence_length,
        split=config.data.split,
        seed=config.run.seed,
        held_out=held_out,
        documents=config.data.mask_documents,
    )
    opened: list[Samples] = []
    broadcast_from_first(lambda: opened.append(open_now()), group=groups.world)
    return opened[0] if opened else open_now()
