"""Time a training step with each position method, relative to one without positions. Prints one JSON line.

Forward, loss and backward, fp32, all cores: 4 layers x 512, 8 heads of 64. Compare ratios between machines, not
milliseconds.
"""

import time

import torch

from benchmarks.machine import print_result
from configs.positions import POSITIONS
from configs.schema import Model
from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from training.model.single import lone_decoder

VOCABULARY, REPEATS = 4096, 7


def main() -> None:
    """Time each method at 1024 and 2048 tokens; they take turns, and the fastest of several repeats counts."""
    lengths = {}
    for length in (1024, 2048):
        fastest = dict.fromkeys(POSITIONS, float("inf"))
        decoders = {position: _decoder(position) for position in POSITIONS}
        tokens = torch.randint(0, VOCABULARY, (1, length + 1))
        for _ in range(REPEATS):
            for position, decoder in decoders.items():
                started = time.perf_counter()
                decoder(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
                fastest[position] = min(fastest[position], time.perf_counter() - started)
        lengths[length] = {
            name: {"ms": round(1000 * seconds), "ratio": round(seconds / fastest["none"], 3)}
            for name, seconds in fastest.items()
        }
    print_result("positions", lengths=lengths)


def _decoder(position: str) -> torch.nn.Module:
    model = Model(layers=4, hidden=512, heads=8, position=position)  # type: ignore[arg-type]
    decoder = lone_decoder(model, vocab_size=VOCABULARY)
    initial_weights(decoder, seed=1, tensor=lone_groups().tensor)
    return decoder


if __name__ == "__main__":
    main()
