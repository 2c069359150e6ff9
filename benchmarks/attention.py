"""Time attention alone, forward and backward, against other ways to compute it with torch. Prints one JSON line.

16 heads of 128, fp32, batch 1, all cores. Compare ratios between machines, not milliseconds.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import print_result
from parallel.start import flush_denormals
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import slopes
from training.model.positions.bias import SlopeBias, causal_bias

HEADS, HEAD_DIM, REPEATS = 16, 128, 5


def main() -> None:
    """Time each implementation at 1024 and 2048 tokens; report the fastest of several repeats."""
    flush_denormals()  # as every rank does
    lengths = {
        length: {name: _milliseconds(attend, length) for name, attend in _implementations(length).items()}
        for length in (1024, 2048)
    }
    print_result("attention", unit="ms", lengths=lengths)


def _implementations(length: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    strip = SlopeBias(torch.tensor(slopes(HEADS)))
    whole = causal_bias(torch.tensor(slopes(HEADS)), queries=length, keys=length)[None]
    return {
        "trainshort sdpa": Sdpa(strip),
        "trainshort reference": Reference(strip),
        "sdpa with a whole bias": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=whole),
        "sdpa causal, no positions": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }


def _milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> float:
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        attend(q, k, v).sum().backward()
        fastest = min(fastest, time.perf_counter() - started)
    return round(1000 * fastest, 1)


if __name__ == "__main__":
    main()
