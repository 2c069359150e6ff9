"""Measure losses and peak memory of one long sequence in a separate process. Prints JSON."""

import json
import re
import sys
from pathlib import Path

import torch

from configs.schema import Model
from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from training.model.cache import KeyValueCache
from training.model.decoder import Decoder
from training.model.single import SingleModel, lone_decoder

VOCABULARY = 97
SHORTEST = 8192
CHUNK = 512


def make(backend: str) -> Decoder:
    """Return a small decoder; its weights do not depend on the backend."""
    model = Model(layers=2, hidden=64, heads=4, init_std=0.1, attention=backend)  # type: ignore[arg-type]
    decoder = lone_decoder(model, vocab_size=VOCABULARY)
    initial_weights(decoder, seed=1, tensor=lone_groups().tensor)
    return decoder


def reference_losses(tokens: torch.Tensor) -> torch.Tensor:
    """Return losses of tokens [1, length + 1], [1, length], by the reference backend, which materializes all scores.

    The queries go through in chunks, with a cache for the keys and values before them, to bound the memory.
    """
    decoder, cache = make("reference"), KeyValueCache()
    with torch.no_grad():
        parts = [decoder.logits(decoder.hidden(part, cache)) for part in torch.split(tokens[:, :-1], CHUNK, dim=1)]
    return torch.nn.functional.cross_entropy(torch.cat(parts)[:, 0], tokens[0, 1:], reduction="none")[None]


def peak_gb() -> float:
    """Return this process's peak memory. Do not use getrusage: its peak includes the parent process."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match
    return int(match[1]) * 1024 / 1e9


def main() -> None:
    """Score one sequence at doubling lengths."""
    tokens = torch.randint(0, VOCABULARY, (1, int(sys.argv[1]) + 1), generator=torch.Generator().manual_seed(0))
    model = SingleModel(make("sdpa"), device=torch.device("cpu"), certificate={})
    peaks, losses, length = {}, {}, SHORTEST
    while length < tokens.shape[1]:
        losses[length] = model.losses(tokens[:, : length + 1])
        peaks[length] = peak_gb()
        length *= 2
    longest = losses[max(losses)]
    sys.stdout.write(
        json.dumps(
            {
                "peaks_gb": peaks,
                "mean_loss": longest.mean().item(),
                "prefix_difference": max(
                    (longest[:, :length] - prefix).abs().max().item() for length, prefix in losses.items()
                ),
                "whole_difference": (losses[SHORTEST] - reference_losses(tokens[:, : SHORTEST + 1])).abs().max().item(),
            }
        )
    )


if __name__ == "__main__":
    main()
