"""Choose the sequences that are held out for validation, as a function of their number alone."""

import numpy as np
from numpy.random import PCG64, SeedSequence
from numpy.typing import NDArray

_SEED = 20211008  # fixed: the held-out text must not change with the run's seed


def shuffled(count: int, *, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Return a permutation of `count` numbers, [count].

    It sorts raw bits of PCG64, which numpy guarantees to stay the same. `Generator.permutation` may change with a
    release of numpy: a run resumed after an update would then see some text twice and some never.
    """
    # stable, so that equal bits give the same order on every platform
    return np.argsort(_random_bits(count, seed=seed), kind="stable")


def held_out_count(count: int, *, share: float) -> int:
    """Return how many of `count` sequences are held out: at least one, and at least one is left to train on."""
    return 0 if share == 0 or count < 2 else min(max(round(count * share), 1), count - 1)


def held_out_sequences(count: int, *, share: float) -> NDArray[np.int64]:
    """Return the held-out sequences in ascending order, [held_out_count]. A larger share includes a smaller one."""
    return np.flatnonzero(_is_held_out(count, share=share))


def training_sequences(count: int, *, share: float) -> NDArray[np.int64]:
    """Return the sequences that are not held out, in ascending order, [count - held_out_count]."""
    return np.flatnonzero(~_is_held_out(count, share=share))


def _is_held_out(count: int, *, share: float) -> NDArray[np.bool_]:
    """Return whether each sequence is among the first of `shuffled`, [count], without sorting them all."""
    held_out = held_out_count(count, share=share)
    if not held_out:
        return np.zeros(count, np.bool_)
    bits = _random_bits(count, seed=(_SEED,))
    last = np.partition(bits, held_out - 1)[held_out - 1]
    is_held_out: NDArray[np.bool_] = bits < last
    equal = np.flatnonzero(bits == last)
    is_held_out[equal[: held_out - np.count_nonzero(is_held_out)]] = True
    return is_held_out


def _random_bits(count: int, *, seed: tuple[int, ...]) -> NDArray[np.uint64]:
    return PCG64(SeedSequence(seed)).random_raw(count)
