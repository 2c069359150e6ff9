"""Time a training step in one process against transformers' Bloom of the same shape. Prints one JSON line.

Forward, loss, backward and AdamW, fp32, all cores. Each model runs in a process of its own, so that the peak resident
set of one does not include the other. Compare ratios between machines, not seconds.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model

STEPS = 4


@dataclass(frozen=True)
class Shape:
    """Shape of the model and of a batch."""

    hidden: int
    heads: int
    layers: int
    length: int
    batch: int
    vocab: int


SHAPES = (Shape(512, 8, 6, 512, 4, 8192), Shape(1024, 16, 4, 1024, 1, 8192), Shape(1024, 16, 4, 2048, 1, 8192))


def main() -> None:
    """Measure each shape with each model; in a child process, only the one that the arguments name."""
    if len(sys.argv) == 3:
        print(json.dumps(_measure(sys.argv[1], SHAPES[int(sys.argv[2])])))
        return
    shapes = []
    for index, shape in enumerate(SHAPES):
        row = {name: _measure_in_child(name, index) for name in ("trainshort", "transformers")}
        speedup = row["transformers"]["seconds"] / row["trainshort"]["seconds"]
        shapes.append({**asdict(shape), **row, "speedup": speedup})
    print(json.dumps({"benchmark": "train_step", "threads": torch.get_num_threads(), "shapes": shapes}))


def _measure_in_child(name: str, index: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, name, str(index)], capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _measure(name: str, shape: Shape) -> dict[str, float]:
    module, loss_of = _trainshort(shape) if name == "trainshort" else _transformers(shape)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.length + 1))
    fastest = float("inf")
    for _ in range(STEPS):
        started = time.perf_counter()
        loss_of(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad()
        fastest = min(fastest, time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": round(fastest, 3), "peak_gb": round(peak, 2)}


def _trainshort(shape: Shape) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from parallel.groups import lone_groups
    from parallel.layers import mean_loss
    from parallel.seeds import initial_weights
    from training.model.single import lone_decoder

    model = Model(layers=shape.layers, hidden=shape.hidden, heads=shape.heads)
    decoder = lone_decoder(model, vocab_size=shape.vocab)
    initial_weights(decoder, seed=1, tensor=lone_groups().tensor)
    return decoder, lambda inputs, targets: mean_loss(decoder(inputs), targets)


def _transformers(shape: Shape) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=shape.vocab, hidden_size=shape.hidden, n_layer=shape.layers, n_head=shape.heads)
    bloom = BloomForCausalLM(config)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(bloom(inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())

    return bloom, loss_of


if __name__ == "__main__":
    main()
