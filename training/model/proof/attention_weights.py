"""What attention weights a backend computes, read off its outputs: the backend itself need not tell.

Values that each mark one key make the output of a query its weights. The certificate and the audit both read so.
"""

import torch
from torch import Tensor

from training.model.attention import Attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far a row may be from the exact one, in total variation.
ROW_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
BATCH_ENTRIES = 2**22  # of the values, and of the scores, of one call: 16 MiB in fp32


def read_rows(attend: Attention, q: Tensor, k: Tensor, *, first: int = 0) -> Tensor:
    """Return the weights of each query on the keys from `first` on.

    The heads are as wide as in the run, so that the backend takes the kernel that it takes there. Each pass reads one
    head_dim of keys; several passes are a batch.

    Args:
        attend: Any backend's attention.
        q: [1, heads, queries, head_dim].
        k: [1, heads, keys, head_dim].
        first: Number of the first key to read.
    Returns:
        [heads, queries, keys - first] fp64, on the CPU.
    """
    keys, width = k.shape[2], k.shape[3]
    passes = -(-(keys - first) // width)
    # The values of all passes are windows on one column of zeros with one identity in it: each pass sees it `width`
    # rows higher than the one before, so the last keys come first.
    lowest = first + (passes - 1) * width
    column = torch.zeros(lowest + max(keys, width), width, dtype=k.dtype, device=k.device)
    column[lowest : lowest + width].fill_diagonal_(1.0)
    windows = column.unfold(0, keys, width)[:passes].mT[:, None].expand(-1, k.shape[1], -1, -1)
    at_once = max(1, BATCH_ENTRIES // (k.shape[1] * keys * max(width, q.shape[2])))
    # Kernels get values of their own: what overlaps in memory has strides that no kernel must take.
    read = [
        attend(q.expand(len(v), -1, -1, -1), k.expand(len(v), -1, -1, -1), v.contiguous())
        for v in torch.split(windows, at_once)
    ]
    weights = torch.cat(read).flip(0).permute(1, 2, 0, 3).flatten(2)
    return weights[:, :, : keys - first].to("cpu", torch.float64)


def read_total(attend: Attention, q: Tensor, k: Tensor, *, before: int) -> Tensor:
    """Return the weight of each query on all keys before one together, [heads, queries] fp64; shapes as above."""
    marks = torch.zeros_like(k)
    marks[:, :, :before, 0] = 1.0
    return attend(q, k, marks)[0, :, :, 0].to("cpu", torch.float64)


def read_classes(attend: Attention, q: Tensor, k: Tensor) -> Tensor:
    """Return the weights of each query on classes of keys, [heads, queries, head_dim] fp64, all read in one pass.

    A key's class is its number modulo head_dim; `in_classes` says what exact rows give to each. Shapes as above.
    """
    keys, width = k.shape[2], k.shape[3]
    marks = torch.eye(width, dtype=k.dtype, device=k.device).repeat(-(-keys // width), 1)[:keys]
    return attend(q, k, marks.expand_as(k).contiguous())[0].to("cpu", torch.float64)


def in_classes(rows: Tensor, *, classes: int) -> Tensor:
    """Return exact rows [heads, rows, keys] summed over each class of keys, [heads, rows, classes]."""
    return rows @ torch.eye(classes, dtype=rows.dtype).repeat(-(-rows.shape[2] // classes), 1)[: rows.shape[2]]


def total_variation(rows: Tensor, expected: Tensor) -> Tensor:
    """Return half the sum of absolute differences of each row, [heads, rows]; nan where a row has one."""
    return (rows - expected).abs().sum(-1) / 2
