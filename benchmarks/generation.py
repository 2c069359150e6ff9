"""Time greedy generation with a key-value cache against transformers, with the same weights. Prints one JSON line.

12 layers x 768, 12 heads, fp32, all cores, 64 new tokens at several prompt lengths. The two take turns, so that load
from elsewhere slows both; the fastest round counts. Compare ratios between machines, not seconds.
"""

import time

import torch
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.machine import print_result
from configs.schema import Model
from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from parallel.shards import declared
from training.families.table import huggingface_names
from training.generation import continue_tokens
from training.model.single import SingleModel, lone_decoder
from training.sampling import Sampling

VOCABULARY, NEW, ROUNDS = 8192, 64, 4
Timings = dict[str, float]
MODEL = Model(layers=12, hidden=768, heads=12, init_std=0.05)


def main() -> None:
    """Time the prompt and each further token, at several prompt lengths."""
    decoder = lone_decoder(MODEL, vocab_size=VOCABULARY)
    initial_weights(decoder, seed=1, tensor=lone_groups().tensor)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=MODEL.hidden, n_layer=MODEL.layers, n_head=MODEL.heads)
    ).eval()
    theirs, names = dict(bloom.named_parameters()), huggingface_names(MODEL)
    with torch.no_grad():
        for name, (parameter, _) in declared(decoder).items():
            theirs[names[name]].copy_(parameter)
    single = SingleModel(decoder, device=torch.device("cpu"), certificate={})
    prompts: dict[int, dict[str, Timings]] = {}
    for length in (128, 512, 2048):
        ids = torch.randint(3, VOCABULARY, (1, length))
        rounds = [(_ours(single, ids), _theirs(bloom, ids)) for _ in range(ROUNDS)]
        prompts[length] = {
            name: {key: min(timings[key] for timings in repeats) for key in repeats[0]}
            for name, repeats in zip(("trainshort", "transformers"), zip(*rounds, strict=True), strict=True)
        }
    print_result("generation", prompts=prompts)


def _ours(model: SingleModel, ids: torch.Tensor) -> Timings:
    stream = continue_tokens(model, ids[0].tolist(), sampling=Sampling(), end=None)
    started = time.perf_counter()
    next(stream)
    first = time.perf_counter()
    for _ in range(NEW - 1):
        next(stream)
    return _timings(started, first, time.perf_counter())


@torch.no_grad()
def _theirs(bloom: BloomForCausalLM, ids: torch.Tensor) -> Timings:
    started = time.perf_counter()
    out = bloom(ids, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    mask = torch.ones_like(ids)
    for _ in range(NEW - 1):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        out = bloom(token, past_key_values=out.past_key_values, attention_mask=mask, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return _timings(started, first, time.perf_counter())


def _timings(started: float, first: float, ended: float) -> Timings:
    return {"prefill_ms": round(1000 * (first - started)), "token_ms": round(1000 * (ended - first) / (NEW - 1), 1)}


if __name__ == "__main__":
    main()
