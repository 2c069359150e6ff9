"""Evaluate an ALiBi checkpoint with its bias rounded in several ways: how much of a curve is rounding?

    python -m benchmarks.rounding RUN_OR_CHECKPOINT --data TEXT [--lengths 128 ... 4096] [--tokens N]

Everything else stays in fp32. Prints a JSON line for each length, with the perplexity of each way:

* relative: minus slope times distance in fp32, as trainshort computes it;
* relative-bf16: the same, rounded to bf16;
* key-bf16: slope times the key's number, rounded to bf16, as transformers' Bloom adds it in bf16. In exact arithmetic
  this differs from the first by a constant in each row, which the softmax does not see;
* key-bf16-scores: that, and the sum of product and bias rounded to bf16 too, as a bf16 `baddbmm` returns it.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import print_result
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.text import file_text
from training.model.positions.bias import Bias
from training.model.single import CPU_BATCH_TOKENS, SingleModel, load_single

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_ROWS = 512  # queries whose scores are in memory at one time


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each length in each way, on the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a text, as for `trainshort evaluate --data`")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="each a divisor of the longest")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text, at most")
    options = parser.parse_args(arguments)
    checkpoint, longest = open_checkpoint(options.checkpoint), max(options.lengths)
    tokens = tokens_of_text(checkpoint, options.data)
    windows = min(options.tokens, len(tokens) - 1) // longest
    if not windows:
        parser.error(f"{options.data} has {len(tokens)} tokens, too few for length {longest}: give a longer text")
    model = load_single(checkpoint)
    for length in options.lengths:
        perplexities = {}
        for name, score in WAYS.items():
            for block in model.blocks:
                block.attend = RoundedAttention(block.attend.bias, score)
            perplexities[name] = perplexity(model, tokens[: windows * longest + 1], length=length)
        exact = perplexities["relative"]
        print_result(
            "rounding",
            length=length,
            tokens=windows * longest,
            perplexity={name: round(each, 4) for name, each in perplexities.items()},
            change={name: f"{each / exact - 1:+.3%}" for name, each in perplexities.items()},
        )


def tokens_of_text(checkpoint: Checkpoint, text: Path) -> Tensor:
    """Return a text's tokens, [tokens] int64."""
    return torch.from_numpy(file_text(checkpoint, text).tokens.astype(np.int64))


def perplexity(model: SingleModel, tokens: Tensor, *, length: int) -> float:
    """Return the perplexity of all tokens but the first, in windows of `length` that do not overlap.

    Args:
        model: The model.
        tokens: [tokens] int64, one more than a multiple of the length.
        length: Inputs of a window.
    """
    windows = tokens.unfold(0, length + 1, length)  # [windows, length + 1]
    losses = [model.losses(batch) for batch in torch.split(windows, max(1, CPU_BATCH_TOKENS // length))]
    return math.exp(torch.cat(losses).double().mean())


Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # products, slopes, queries, keys -> scores


class RoundedAttention:
    """Causal attention written out in fp32, but for what `score` rounds."""

    def __init__(self, bias: Bias, score: Score) -> None:
        """Take ALiBi's bias for its slopes, and what makes scores of products, slopes and positions."""
        self.bias, self._score = bias, score

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]; the queries are the last positions of the keys."""
        slopes = self.bias.local_slopes
        if slopes is None:
            raise ValueError("only ALiBi has a bias to round")
        slopes, before = slopes.to(q.device).float()[:, None, None], k.shape[2] - q.shape[2]
        joined = []
        for first in range(0, q.shape[2], _ROWS):
            rows = q[:, :, first : first + _ROWS]
            queries = torch.arange(before + first, before + first + rows.shape[2], device=q.device)[:, None]
            keys = torch.arange(int(queries[-1]) + 1, device=q.device)
            products = rows @ k[:, :, : len(keys)].mT / q.shape[-1] ** 0.5
            scores = self._score(products, slopes, queries, keys).masked_fill(keys > queries, -torch.inf)
            joined.append(scores.softmax(-1) @ v[:, :, : len(keys)])
        return torch.cat(joined, 2)


def _bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


WAYS: dict[str, Score] = {
    "relative": lambda products, slopes, queries, keys: products - slopes * (queries - keys),
    "relative-bf16": lambda products, slopes, queries, keys: products - _bf16(slopes * (queries - keys)),
    "key-bf16": lambda products, slopes, queries, keys: products + _bf16(slopes * keys),
    "key-bf16-scores": lambda products, slopes, queries, keys: _bf16(products + _bf16(slopes * keys)),
}


if __name__ == "__main__":
    main()
