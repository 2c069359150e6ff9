"""Which sequences are held out for validation: a function of how many there are, and of nothing else."""

import numpy as np
from numpy.random import PCG64, SeedSequence
from numpy.typing import NDArray

_SEED = 20211008


def shuffled(count: int, *, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Return a permutation of `count` numbers, [count].

    Made of the raw bits of PCG64, which numpy promises to keep; `Generator.permutation` may change with a
    release, and a run resumed after an update would then see some text twice and some never.
    """
    bits = PCG64(SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


def held_out_count(count: int, *, share: float) -> int:
    """Return how many of `count` sequences are held out: at least one, and one is left to train on."""
    return 0 if share == 0 or count < 2 else min(max(round(count * share), 1), count - 1)


def held_out_sequences(count: int, *, share: float) -> NDArray[np.int64]:
    """Return the held-out sequences in ascending order, [held_out_count]; a larger share holds a smaller one's."""
    return np.sort(shuffled(count, seed=(_SEED,))[: held_out_count(count, share=share)])


def training_sequences(count: int, *, share: float) -> NDArray[np.int64]:
    """Return the sequences that are not held out in ascending order."""
    return np.sort(shuffled(count, seed=(_SEED,))[held_out_count(count, share=share) :])
