"""Time lossless windows with trained weights: training steps, evaluation at length, decoding. Prints a JSON line a row.

    python -m benchmarks.windows [--checkpoint RUN_OR_CHECKPOINT] [--only PART ...] [--lengths 1024 4096]

How far a head looks depends on its weights, and random ones look less far than trained ones. Without a checkpoint, it
trains its own on Python's documentation: one layer of the 1.3B shape, 300 steps, some ten minutes on two cores. Steps
without positions start from random weights: their time does not depend on them. Compare ratios between machines, not
seconds.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.commands import Bench, Shape
from benchmarks.machine import print_result
from configs.schema import Source
from data_pipeline.sources import source_chunks
from data_pipeline.tokenizer import load_tokenizer
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.export.run import export_checkpoint
from training.model.cache import KeyValueCache
from training.model.single import load_single

PARTS = ("steps", "evaluation", "decoding")
HIDDEN, HEADS, LAYERS = 2048, 16, 1
TRAINED_STEPS, TRAINED_LENGTH, TRAINED_BATCH = 300, 128, 2
# length: rounds, steps of a round
STEPS = {1024: (2, 4), 4096: (1, 3), 16_384: (1, 1)}
SHORT, LONG, CACHED, NEW = 2048, 65_536, 32_768, 8
VARIANTS = {
    "none": ["model.position=none"],
    "alibi": [],
    "alibi, windows off": ["model.windows=off"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a trained ALiBi run or checkpoint; one is trained unless given")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--lengths", nargs="+", type=int, choices=STEPS, default=list(STEPS), help="of the steps")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        if options.checkpoint:
            checkpoint, bench = open_checkpoint(Path(options.checkpoint)), None
        else:
            bench = Bench(Path(home), data=["data.sources=[python-docs]"])
            checkpoint = _train(bench)
        if "steps" in options.only:
            bench = bench or Bench(Path(home), data=_data_of(checkpoint))
            for length in options.lengths:
                _steps(bench, checkpoint, length=length)
        if "evaluation" in options.only:
            _evaluation(checkpoint)
        if "decoding" in options.only:
            _decoding(checkpoint, export=Path(home) / "export")


def _train(bench: Bench) -> Checkpoint:
    shape = Shape(HIDDEN, HEADS, LAYERS, TRAINED_LENGTH, TRAINED_BATCH)
    keys = [*shape.overrides(), "train.learning_rate=7e-4", "train.min_learning_rate=1e-4"]
    return open_checkpoint(bench.train(keys, steps=TRAINED_STEPS).run_dir)


def _data_of(checkpoint: Checkpoint) -> list[str]:
    """Return the keys by which a run has the text and the tokens of a checkpoint."""
    paths = ", ".join(source.path for source in checkpoint.config.data.sources)
    return [
        f"data.sources=[{paths}]",
        f"data.tokenizer={checkpoint.tokenizer}",
        f"data.vocab_size={checkpoint.vocab_size}",
    ]


def _steps(bench: Bench, checkpoint: Checkpoint, *, length: int) -> None:
    """Time steps of each variant; they take turns, so that load from elsewhere slows all."""
    model = checkpoint.config.model
    shape = Shape(model.hidden, model.heads, model.layers, length)
    # so small a learning rate that the weights stay as they are
    keys = [*shape.overrides(), "train.learning_rate=1e-9", "train.min_learning_rate=0"]
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    memory = dict.fromkeys(VARIANTS, 0.0)
    rounds, steps = STEPS[length]
    for _ in range(rounds):
        for name, differs in VARIANTS.items():
            start = [] if name == "none" else [f"train.init_from={checkpoint.path}"]
            measured = bench.train([*keys, *differs, *start], steps=steps)
            seconds[name] += measured.seconds
            memory[name] = max(memory[name], measured.memory_gb)
    none = median(seconds["none"])
    print_result(
        "windows",
        part="steps",
        **asdict(shape),
        seconds={name: round(median(each), 3) for name, each in seconds.items()},
        time_ratio={name: round(median(each) / none, 3) for name, each in seconds.items()},
        memory_gb={name: round(each, 2) for name, each in memory.items()},
        memory_ratio={name: round(each / memory["none"], 3) for name, each in memory.items()},
    )


def _evaluation(checkpoint: Checkpoint) -> None:
    """Time one pass over a short and a long window."""
    model, tokens = load_single(checkpoint), tokens_of(checkpoint, count=LONG + 1)
    model.losses(tokens[:, : SHORT + 1])
    seconds: dict[int, float] = {}
    losses: dict[int, float] = {}
    for length in (SHORT, LONG):
        began = time.perf_counter()
        losses[length] = round(float(model.losses(tokens[:, : length + 1]).mean()), 4)
        seconds[length] = time.perf_counter() - began
    each = {length: 1000 * spent / length for length, spent in seconds.items()}
    print_result(
        "windows",
        part="evaluation",
        ms_a_token={length: round(ms, 4) for length, ms in each.items()},
        times_slower=round(each[LONG] / each[SHORT], 2),
        loss=losses,
    )


def tokens_of(checkpoint: Checkpoint, *, count: int) -> Tensor:
    """Return the first tokens of a checkpoint's text, [1, count]."""
    tokenizer, ids = load_tokenizer(checkpoint.tokenizer), list[int]()
    for text in _texts(checkpoint.config.data.sources):
        ids += tokenizer.encode(text)
        if len(ids) >= count:
            break
    return torch.tensor([list(islice(ids, count))])


def _texts(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        yield from (chunk.text for chunk in source_chunks(source, separator=None))


@torch.no_grad()
def _decoding(checkpoint: Checkpoint, *, export: Path) -> None:
    """Time the next token after a long cache against transformers' Bloom with the same weights, keys and values."""
    from transformers import AutoModelForCausalLM, DynamicCache

    tokens = tokens_of(checkpoint, count=CACHED)
    model, cache = load_single(checkpoint), KeyValueCache()
    for part in torch.split(tokens, SHORT, dim=1):
        model.next_logits(part, cache)
    export_checkpoint(checkpoint.path, format="hf", out=export)
    bloom, their_cache = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32), DynamicCache()
    for block, (k, v) in sorted(cache.pairs.items()):
        their_cache.update(k[:, :, : cache.length].clone(), v[:, :, : cache.length].clone(), block)
    seconds: dict[str, list[float]] = {"trainshort": [], "transformers": []}
    difference, token = 0.0, tokens[:, -1:]
    for number in range(NEW):
        began = time.perf_counter()
        ours = model.next_logits(token, cache)
        between = time.perf_counter()
        mask = torch.ones(1, CACHED + number + 1, dtype=torch.int64)
        theirs = bloom(token, past_key_values=their_cache, attention_mask=mask, use_cache=True).logits[:, -1]
        ended = time.perf_counter()
        seconds["trainshort"].append(between - began)
        seconds["transformers"].append(ended - between)
        difference = max(difference, float((ours - theirs).abs().max()))
        token = ours.argmax(-1, keepdim=True)
    ms = {name: 1000 * median(each) for name, each in seconds.items()}
    print_result(
        "windows",
        part="decoding",
        cached=CACHED,
        token_ms={name: round(each, 1) for name, each in ms.items()},
        times_faster=round(ms["transformers"] / ms["trainshort"], 2),
        largest_difference_of_logits=difference,
    )


if __name__ == "__main__":
    main()
