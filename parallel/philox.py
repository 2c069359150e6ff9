"""Philox in tensor operations: the bits of numpy's generator, computed where the tensors lie.

Drawing 1.36e9 weights on the CPU and sending them to a GPU takes seconds; a GPU computes the same bits in a fraction of
one. On a CPU numpy is faster. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW = (1 << 32) - 1
_WORD = 1 << 64


def philox_bits(key: int, counters: Tensor) -> Tensor:
    """Return the 256 random bits of each counter as sixteen numbers, the least significant first.

    Args:
        key: Of 64 bits at most.
        counters: How many steps of the generator come before, [...], int64.
    Returns:
        [..., 16], int32 in [0, 65536).
    """
    keys = (key, 0)
    # numpy increments the counter before it draws; only its first word is ever reached
    words = [counters + 1, *(torch.zeros_like(counters) for _ in range(3))]
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(words[0], _MULTIPLIERS[0])
        high_1, low_1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high_1 ^ words[1] ^ _signed(keys[0]), low_1, high_0 ^ words[3] ^ _signed(keys[1]), low_0]
        keys = ((keys[0] + _KEY_STEPS[0]) % _WORD, (keys[1] + _KEY_STEPS[1]) % _WORD)
    # int64 [..., 4] -> int16 [..., 16]: GPUs, like all machines that torch runs on, store the low bits first
    return torch.stack(words, dim=-1).view(torch.int16).to(torch.int32) & 0xFFFF


def _multiply(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of an unsigned product of 128 bits.

    Torch's int64 wraps, as unsigned numbers do; only its shift to the right copies the sign, which `_high` masks off.
    """
    low, high = value & _LOW, _high(value)
    factor_low, factor_high = factor & _LOW, factor >> 32
    middle = high * factor_low + _high(low * factor_low)
    other = low * factor_high + (middle & _LOW)
    return high * factor_high + _high(middle) + _high(other), value * _signed(factor)


def _high(value: Tensor) -> Tensor:
    return (value >> 32) & _LOW


def _signed(word: int) -> int:
    """Return the int64 that has the bits of an unsigned word."""
    return word - _WORD if word >> 63 else word
