"""Weights in other types than fp32."""

from torch import Tensor

from configs.errors import InputError


def finite(weight: Tensor, *, dtype: str) -> Tensor:
    """Return a rounded weight; refuse one that is out of its type's range.

    Raises:
        InputError: names the type.
    """
    if not bool(weight.isfinite().all()):
        raise InputError(f"a weight is larger than {dtype} can hold: export in a wider type")
    return weight
