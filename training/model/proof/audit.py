"""The precision audit: how far the attention that a backend computes is from exact ALiBi, at any length.

Draw queries and keys so that q k^T / sqrt(d) ~ N(0, 1), round them to the run's type, and give them to the backend.
The oracle takes the same rounded numbers in fp64. The difference is the error of bias, softmax and sums.

Two other forms of the bias are compared too, each rounded to the run's type with all else exact, so that their error
is that of rounding alone:

* absolute, slope * key, as BLOOM's own code and transformers' Bloom keep it. Softmax sees only differences of scores,
  so on paper it is the same bias. But the penalty between neighbours is one slope, while the number that holds it grows
  with the position: at key 1023 the sharpest of 16 heads has 0.71 * 1023 = 723, where bf16 counts in steps of 4. Five
  or six neighbouring keys then share one bias, and the next ones differ by 4. The error is largest at the last keys,
  where the attention is, and grows with the length. fp32 has the same defect, 65,536 times smaller.
* relative, -slope * distance. Far keys have large numbers but weigh nothing; near keys have small, exact enough ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.model.attention import Attention, make_attention
from training.model.positions.bias import QUERY_BLOCK, SlopeBias
from training.model.proof.attention_weights import read_rows, read_total, total_variation
from training.model.proof.head_windows import HeadWindow, head_windows
from training.model.windows import LosslessWindows

SAMPLE_WEIGHTS = 2**22  # attention weights compared at one length
SAMPLE_QUERIES = 8  # fewest queries compared: the last ones, which have the longest rows
GROUP_WEIGHTS = 2**22  # entries of one group of heads' bias, so that memory is bounded
FAR = 1e-9  # keys that together weigh less than this are read as one


@dataclass(frozen=True)
class Distance:
    """Total variation between one head's rows and the exact ones: 0 if equal, 1 if they have no weight in common.

    Attributes:
        worst, mean: Over the rows.
    """

    worst: float
    mean: float

    @classmethod
    def of(cls, rows: Tensor) -> "Distance":
        """Return that of rows whose total variations are given, [rows]."""
        return cls(float(rows.max()), float(rows.mean()))


@dataclass(frozen=True)
class HeadAudit:
    """One head at one length.

    Attributes:
        head: Its global number.
        slope: Its slope.
        measured: What the backend computes.
        absolute, relative: The forms slope * key and -slope * distance, rounded to the run's type.
        window: How far back its queries need keys.
    """

    head: int
    slope: float
    measured: Distance
    absolute: Distance
    relative: Distance
    window: HeadWindow


@dataclass(frozen=True)
class LengthAudit:
    """One length.

    Attributes:
        length: Keys of the last query.
        queries: How many queries were compared, the last ones.
        heads: The heads compared, by number.
        density: Share of the causal scores of these queries that the backend computed; None if it does not count them.
    """

    length: int
    queries: int
    heads: tuple[HeadAudit, ...]
    density: float | None

    @property
    def worst(self) -> HeadAudit:
        """The head whose measured rows are furthest from exact."""
        return max(self.heads, key=lambda head: head.measured.worst)


@torch.no_grad()
def audit(
    backend: str,
    *,
    slopes: Sequence[float],
    head_dim: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    windows: bool = True,
    by_scores: bool = False,
) -> LengthAudit:
    """Compare a backend's ALiBi attention with the exact one at one length; memory stays bounded.

    Args:
        backend: Name of the attention backend.
        slopes: Slope of each head of the model; a sample of them is compared if all are too many.
        head_dim: Width of a head.
        length: Tokens.
        dtype: Type of queries and keys.
        device: Where attention runs; the oracle is computed on the CPU.
        windows: Whether the backend may leave out keys without weight.
        by_scores: Whether a GPU's looks at scores for that, instead of norms alone.
    """
    queries = min(length, max(SAMPLE_QUERIES, SAMPLE_WEIGHTS // (len(slopes) * length)))
    chosen = sample_heads(slopes, count=max(2, SAMPLE_WEIGHTS // (queries * length)))
    at_once = max(1, GROUP_WEIGHTS // (max(queries, QUERY_BLOCK) * length))
    generator = torch.Generator().manual_seed(length)
    audits: list[HeadAudit] = []
    lossless = LosslessWindows(by_scores=by_scores) if windows else None
    shares: list[tuple[Tensor, int]] = []
    for start in range(0, len(chosen), at_once):
        group = chosen[start : start + at_once]
        q = torch.randn(1, len(group), queries, head_dim, generator=generator).to(dtype)
        k = torch.randn(1, len(group), length, head_dim, generator=generator).to(dtype)
        slope = torch.tensor([slopes[head] for head in group], dtype=torch.float64)
        bias = SlopeBias(slope)
        bias.lossless = lossless
        audits += _audit_group(make_attention(backend, bias), group, slope=slope, q=q, k=k, device=device)
        shares += [(density, len(group)) for density in (lossless.take() if lossless else [])]
    total = sum(count for _, count in shares)
    density = sum(float(share) * count for share, count in shares) / total if total else None
    return LengthAudit(length, queries, tuple(audits), density)


def sample_heads(slopes: Sequence[float], *, count: int) -> list[int]:
    """Return the numbers of at most `count` heads: the steepest, the flattest, and others evenly spaced by slope."""
    heads = len(slopes)
    if count >= heads:
        return list(range(heads))
    by_slope = sorted(range(heads), key=lambda head: -slopes[head])
    return sorted(by_slope[round(place * (heads - 1) / (count - 1))] for place in range(count))


def _audit_group(
    attend: Attention, group: Sequence[int], *, slope: Tensor, q: Tensor, k: Tensor, device: torch.device
) -> list[HeadAudit]:
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(keys)
    distance = torch.arange(keys - queries, keys)[:, None] - position
    scores = ((q[0].double() @ k[0].double().mT) / q.shape[-1] ** 0.5).masked_fill_(distance < 0, -torch.inf)
    exact = (scores - slope[:, None, None] * distance).softmax(-1)  # [heads, queries, keys]

    def rounded(penalty: Tensor) -> Tensor:
        # Compute in fp32 and round, as implementations that store the bias do.
        bias = (slope.float()[:, None, None] * penalty).to(q.dtype)
        return total_variation((scores + bias.double()).softmax(-1), exact)

    measured = _measured(attend, q.to(device), k.to(device), exact=exact)
    forms = zip(measured, rounded(position), rounded(-distance), strict=True)
    windows = head_windows(q, k, slopes=slope, heads=group)
    return [
        HeadAudit(window.head, window.slope, Distance.of(own), Distance.of(absolute), Distance.of(relative), window)
        for window, (own, absolute, relative) in zip(windows, forms, strict=True)
    ]


def _measured(attend: Attention, q: Tensor, k: Tensor, *, exact: Tensor) -> Tensor:
    """Return how far a kernel's rows are from the exact ones, [heads, queries] fp64.

    Far keys are read as one: weights are not negative, so the sum of both sides' weights bounds their difference. This
    is less than rounding, and a row of 65,536 keys takes a tenth of the passes.
    """
    # [keys]: the largest total weight that any row has up to each key
    before = exact.cumsum(-1).amax((0, 1))
    first = int((before < FAR).sum())
    apart = total_variation(read_rows(attend, q, k, first=first), exact[:, :, first:])
    if first:
        apart += (read_total(attend, q, k, before=first) + exact[:, :, :first].sum(-1)) / 2
    return apart.nan_to_num(nan=1.0)  # a row of nan has no weight in common with the exact one
