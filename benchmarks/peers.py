"""A training step of transformers' Bloom in a plain loop: `python -m benchmarks.peers SHAPE STEPS`. Prints JSON.

fp32, AdamW with its fused kernel, clipping as ours; all cores. In a process of its own, for its peak resident set.
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.commands import VOCABULARY, WARM_UP, Shape


def make_bloom(shape: Shape, *, vocab_size: int = VOCABULARY) -> nn.Module:
    """Return transformers' Bloom of a shape, with random weights."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        use_cache=False,
    )
    return BloomForCausalLM(config)


def main() -> None:
    """Time the steps that the arguments ask for."""
    shape, steps = Shape(**json.loads(sys.argv[1])), int(sys.argv[2])
    torch.manual_seed(1)
    bloom = make_bloom(shape)
    optimizer = torch.optim.AdamW(bloom.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(WARM_UP + steps):
        tokens = torch.randint(0, VOCABULARY, (shape.batch, shape.length + 1))
        began = time.perf_counter()
        logits = bloom(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(bloom.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds[WARM_UP:], "memory_gb": peak}))


if __name__ == "__main__":
    main()
