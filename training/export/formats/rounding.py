"""Weights in other types than fp32."""

from torch import Tensor

from configs.errors import InputError


def finite(rounded: Tensor, *, weight: Tensor, dtype: str) -> Tensor:
    """Return a rounded weight; refuse one that is out of its type's range, or was not finite before.

    Args:
        rounded: The weight in its type, as fp32.
        weight: The trained weight.
        dtype: Its type, in messages.
    Raises:
        InputError: names the type, or says that the weight was not finite.
    """
    if bool(rounded.isfinite().all()):
        return rounded
    if not bool(weight.isfinite().all()):
        raise InputError("a weight is nan or infinite: the model has diverged, take an earlier checkpoint")
    raise InputError(f"a weight is larger than {dtype} can hold: export in a wider type")
