"""The attention weights of a kernel, read from its outputs: the kernel need not return them.

If each value vector marks one key, the output of a query is its weights. The certificate and the audit use this.
"""

import torch
from torch import Tensor

from configs.precisions import PRECISIONS
from training.model.attention import Attention

BATCH_ENTRIES = 2**22  # of the values, and of the scores, of one call: 16 MiB in fp32


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of the forward pass for a value of `train.precision`."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision].dtype)
    return dtype


def read_rows(attend: Attention, q: Tensor, k: Tensor, *, first: int = 0) -> Tensor:
    """Return the weights of each query on the keys from `first` on.

    The heads are as wide as in the run, so that torch picks the same kernel. Each pass reads head_dim keys; several
    passes form a batch.

    Args:
        attend: Any kernel.
        q: [1, heads, queries, head_dim].
        k: [1, heads, keys, head_dim].
        first: Number of the first key to read.
    Returns:
        [heads, queries, keys - first] fp64, on the CPU.
    """
    keys, width = k.shape[2], k.shape[3]
    passes = -(-(keys - first) // width)
    # The values of all passes are windows into one column of zeros with one identity matrix in it. Each pass sees the
    # identity `width` rows higher than the pass before, so the last keys come first: hence the flip below.
    lowest = first + (passes - 1) * width
    column = torch.zeros(lowest + max(keys, width), width, dtype=k.dtype, device=k.device)
    column[lowest : lowest + width].fill_diagonal_(1.0)
    # windows: [passes, heads, keys, width]
    windows = column.unfold(0, keys, width)[:passes].mT[:, None].expand(-1, k.shape[1], -1, -1)
    at_once = max(1, BATCH_ENTRIES // (k.shape[1] * keys * max(width, q.shape[2])))
    # Copy each window: the windows overlap in memory, and no kernel promises to handle such strides.
    read = [
        attend(q.expand(len(v), -1, -1, -1), k.expand(len(v), -1, -1, -1), v.contiguous())
        for v in torch.split(windows, at_once)
    ]
    # [passes, heads, queries, width] -> [heads, queries, passes * width]
    weights = torch.cat(read).flip(0).permute(1, 2, 0, 3).flatten(2)
    return weights[:, :, : keys - first].to("cpu", torch.float64)


def read_total(attend: Attention, q: Tensor, k: Tensor, *, before: int) -> Tensor:
    """Return each query's total weight on the keys before index `before`, [heads, queries] fp64; shapes as above."""
    marks = torch.zeros_like(k)
    marks[:, :, :before, 0] = 1.0
    return attend(q, k, marks)[0, :, :, 0].to("cpu", torch.float64)


def read_classes(attend: Attention, q: Tensor, k: Tensor) -> Tensor:
    """Return the weights of each query on classes of keys, [heads, queries, head_dim] fp64, read in one pass.

    A key's class is its number modulo head_dim; `in_classes` sums exact rows in the same way. Shapes as above.
    """
    keys, width = k.shape[2], k.shape[3]
    marks = torch.eye(width, dtype=k.dtype, device=k.device).repeat(-(-keys // width), 1)[:keys]
    return attend(q, k, marks.expand_as(k).contiguous())[0].to("cpu", torch.float64)


def in_classes(rows: Tensor, *, classes: int) -> Tensor:
    """Return exact rows [heads, rows, keys] summed over each class of keys, [heads, rows, classes]."""
    return rows @ torch.eye(classes, dtype=rows.dtype).repeat(-(-rows.shape[2] // classes), 1)[: rows.shape[2]]


def total_variation(rows: Tensor, expected: Tensor) -> Tensor:
    """Return half the sum of absolute differences of each row, [heads, rows]; nan if a row has one."""
    return (rows - expected).abs().sum(-1) / 2
