"""Time an export's own modelling code against transformers' Bloom with the same weights. Prints a JSON line a length.

8 layers x 512, 8 heads, fp32, all cores: one pass over a text, without gradients. The two take turns, so that load from
elsewhere slows both; the median counts. Compare ratios between machines, not seconds.
"""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.machine import print_result
from configs.schema import Model
from training.export.formats.carried.modeling_trainshort import TrainshortConfig, TrainshortForCausalLM
from training.families.table import huggingface_names

VOCABULARY, ROUNDS = 8192, 5
LENGTHS = (512, 1024, 2048)
MODEL = Model(layers=8, hidden=512, heads=8)


@torch.no_grad()
def main() -> None:
    """Time both at several lengths, and compare their logits."""
    models = _same_weights()
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY, (1, length))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        logits = [model(ids, use_cache=False).logits for model in models.values()]
        for _ in range(ROUNDS):
            for name, model in models.items():
                began = time.perf_counter()
                model(ids, use_cache=False)
                seconds[name].append(time.perf_counter() - began)
        ms = {name: 1000 * median(each) for name, each in seconds.items()}
        print_result(
            "exported_code",
            length=length,
            ms={name: round(each) for name, each in ms.items()},
            times_faster=round(ms["bloom"] / ms["carried"], 2),
            largest_difference_of_logits=float((logits[0] - logits[1]).abs().max()),
        )


def _same_weights() -> Mapping[str, Any]:
    torch.manual_seed(1)
    carried = TrainshortForCausalLM(
        TrainshortConfig(
            vocab_size=VOCABULARY,
            layers=MODEL.layers,
            hidden=MODEL.hidden,
            heads=MODEL.heads,
            feed_forward=MODEL.inner,
        )
    )
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=MODEL.hidden, n_layer=MODEL.layers, n_head=MODEL.heads)
    )
    theirs, ours = dict(bloom.named_parameters()), dict(carried.named_parameters())
    for name, other in huggingface_names(MODEL).items():
        theirs[other].copy_(ours[name])
    return {"carried": carried.eval(), "bloom": bloom.eval()}


if __name__ == "__main__":
    main()
