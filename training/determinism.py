"""`train.deterministic`: what may still differ between two starts, and errors of operations that cannot repeat."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.errors import InputError
from parallel.layout import Layout


def limits_of_determinism(layout: Layout, *, device: str) -> str:
    """Return what must stay the same for a run to repeat bit for bit, and what may still change the last bits.

    Args:
        layout: How the ranks are split into axes.
        device: Device type of the ranks: cpu or cuda.
    """
    if device == "cpu":
        return (
            "train.deterministic: losses repeat bit for bit in this layout, with these packages, on this kind of CPU "
            f"and with OMP_NUM_THREADS={torch.get_num_threads()}"
        )
    text = "train.deterministic: losses repeat bit for bit in this layout, with these packages and on this kind of GPU"
    if layout.tensor * layout.data > 1:
        text += "; NCCL may add in another order, and change the last bits, when the ranks run on other GPUs or nodes"
    return text


@contextmanager
def nondeterminism_named() -> Iterator[None]:
    """Name the operation that has no deterministic algorithm, instead of torch's advice to change the program.

    Raises:
        InputError: torch refused an operation.
    """
    try:
        yield
    except RuntimeError as error:
        refused = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if refused is None:
            raise
        raise InputError(
            f"train.deterministic is true, but {refused[1]} has no deterministic algorithm on this device: set "
            "train.deterministic to false, or choose another model.attention or model.position"
        ) from error
