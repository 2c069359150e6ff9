"""Attention alone on a GPU: our backends by length, with and without lossless windows, against torch's causal one."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_lab import Lab, Row, Variant
from configs.backends import BACKENDS
from configs.positions import slopes
from training.model.attention import make_attention
from training.model.decoding import CudaGraph
from training.model.kernels.next_token import AllKeys, Parts
from training.model.positions.alibi import slope_formula
from training.model.positions.bias import SlopeBias
from training.model.windows import LosslessWindows, norms

HEADS, HEAD_DIM = 16, 128
# |q||k| / sqrt(d) of a trained model's steepest and flattest head: small models had 6 to 100
TRAINED_SCORES = (8.0, 60.0)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_rows(lab: Lab) -> Iterator[Variant]:
    """Yield attention alone by length, 16 heads of 128: our backends, and torch's causal one without positions."""
    for length in lab.sizes.attention_lengths:
        yield "causal, no positions", partial(_measure, lab, _causal, length=length)
        for name in BACKENDS:
            if lab.runs(name) and (name != "reference" or length <= 1024):
                yield name, partial(_measure, lab, make_attention(name, _alibi()), length=length)


def window_rows(lab: Lab) -> Iterator[Variant]:
    """Yield attention alone by length on queries and keys with the norms of trained ones.

    cuDNN's causal one without positions, our backends with lossless windows, by norms and by scores, and without.
    Random scores are smaller than a trained model's, and so are windows by scores.
    """
    fused = [name for name in ("flash4", "flex") if lab.runs(name)] or ["sdpa"]
    for length in lab.sizes.window_lengths:
        yield "cuDNN, no positions", partial(_measure, lab, _by_cudnn, length=length, trained=True)
        for name in fused:
            ways = {"on": LosslessWindows(), "by scores": LosslessWindows(by_scores=True), "off": None}
            for word, windows in ways.items():
                attend = make_attention(name, _alibi(windows))
                measure = partial(_measure, lab, attend, length=length, trained=True, windows=windows)
                yield f"{name}, windows {word}", measure


def next_token_rows(lab: Lab) -> Iterator[Variant]:
    """Yield the attention of one token to the keys in a buffer by its length, on queries and keys as in `window_rows`.

    Products with all keys, and on a GPU the kernels that read parts of them, all or those with weight.
    """
    for length in lab.sizes.window_lengths:
        yield "next token, all keys", partial(_next_token, lab, AllKeys, length=length, windows=False)
        if lab.device.type == "cuda":
            yield "next token, by parts", partial(_next_token, lab, Parts, length=length, windows=False)
            yield "next token, by parts, windows on", partial(_next_token, lab, Parts, length=length, windows=True)


def _next_token(lab: Lab, kernel: type[AllKeys | Parts], *, length: int, windows: bool) -> Row:
    lab.forget()
    q, k, v = _inputs(lab, batch=1, length=length, trained=True)
    keys, values = k.contiguous(), v.contiguous()
    attend = kernel(_alibi(), keys)
    position = torch.tensor([length - 1], device=lab.device)
    radius = norms(keys).amax(2, keepdim=True) if windows else None

    def run() -> Tensor:
        attend.begin(position)
        return attend(q[:, :, -1:], keys, values, position=position, radius=radius)

    with torch.no_grad():  # captured, as decoding is: launching takes longer than this work
        captured = CudaGraph(run) if lab.device.type == "cuda" else run
        seconds = lab.seconds(captured, repeats=3, in_a_row=10)
    return {"length": length, "forward_us": round(1e6 * seconds, 1)}


def _alibi(windows: LosslessWindows | None = None) -> SlopeBias:
    bias = SlopeBias(torch.tensor(slopes(HEADS)).double(), slope_of=slope_formula(HEADS, first=0))
    bias.lossless = windows
    return bias


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else nullcontext():
        return _causal(q, k, v)


def _measure(
    lab: Lab, attend: Attend, *, length: int, trained: bool = False, windows: LosslessWindows | None = None
) -> Row:
    lab.forget()
    batch = max(1, lab.sizes.attention_tokens // length)
    q, k, v = (x.requires_grad_() for x in _inputs(lab, batch=batch, length=length, trained=trained))
    gradient = torch.randn_like(q)

    def forward() -> Tensor:
        return attend(q, k, v)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), gradient)

    in_a_row = 10 if lab.device.type == "cuda" else 1
    times = [round(1000 * lab.seconds(action, repeats=3, in_a_row=in_a_row), 3) for action in (forward, both)]
    densities = windows.take() if windows is not None else []
    return {
        "length": length,
        "batch": batch,
        "forward_ms": times[0],
        "forward_backward_ms": times[1],
        "peak_gb": lab.peak_gb(),
        **({"density": round(densities[-1].item(), 3)} if densities else {}),
    }


def _inputs(lab: Lab, *, batch: int, length: int, trained: bool) -> list[Tensor]:
    """Return random queries, keys and values, [batch, heads, length, head_dim], as the projection leaves them.

    Args:
        lab: Where, and in what type.
        batch: Sequences.
        length: Tokens of each.
        trained: Whether queries and keys have the norms of trained ones.
    """
    dtype = torch.bfloat16 if lab.device.type == "cuda" else torch.float32
    shape = (batch, length, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=lab.device, dtype=dtype) for _ in range(3))
    if trained:
        # random queries and keys have largest scores of about sqrt(d)
        low, high = (math.log2(score / HEAD_DIM**0.5) / 2 for score in TRAINED_SCORES)
        scale = torch.logspace(low, high, HEADS, base=2, device=lab.device, dtype=dtype)[:, None]
        q, k = q * scale, k * scale
    return [x.transpose(1, 2) for x in (q, k, v)]
