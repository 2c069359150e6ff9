"""A tokenizer and weights small enough to export in less than a second."""

from pathlib import Path

import sentencepiece
import torch

from configs.schema import Model
from training.export.formats.table import ExportFormat

SHAPE = Model(layers=2, hidden=48, heads=6)

_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "def function(argument): return argument ** 2  # the square of the argument",
    "Perplexity at twice the training length is the question of this project.",
    "Naïve café; Ελληνικά and русский text; 日本語 as well.",
    "    indented   text with   runs of spaces and ====== signs and ------ lines",
]


def train_sentencepiece(folder: Path, **options: object) -> Path:
    """Train a BPE model of 400 pieces, portable unless the options make it otherwise; return its file."""
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "hard_vocab_limit": False,
        "minloglevel": 3,
    }
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT * 4), model_prefix=str(prefix), **{**settings, **options}
    )
    return prefix.with_suffix(".model")


def write_export(
    form: ExportFormat,
    folder: Path,
    *,
    weights: dict[str, torch.Tensor],
    model: Model,
    tokenizer: Path,
    sequence_length: int = 32,
    longest: int = 96,
) -> Path:
    """Write a model in a format to a folder that exists, and return the folder."""
    form.write(
        folder,
        name="my run",
        weights=weights,
        model=model,
        vocab_size=len(weights["embedding.word.weight"]),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        longest=longest,
    )
    return folder


def random_weights(shape: Model, *, vocab_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights by logical name, large enough that each of them changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = shape.hidden
    matrices = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.output": (hidden, hidden),
        "feed_forward.up": (4 * hidden, hidden),
        "feed_forward.down": (hidden, 4 * hidden),
    }
    weights = {"embedding.word.weight": 0.3 * torch.randn(vocab_size, hidden, generator=generator)}
    norms = ["embedding.norm", "final_norm"]
    for block in range(shape.layers):
        norms += [f"blocks.{block}.attention_norm", f"blocks.{block}.feed_forward_norm"]
        for name, (rows, columns) in matrices.items():
            matrix = torch.randn(rows, columns, generator=generator) * 1.2 / columns**0.5
            weights[f"blocks.{block}.{name}.weight"] = matrix
            weights[f"blocks.{block}.{name}.bias"] = 0.2 * torch.randn(rows, generator=generator)
    for name in norms:
        weights[f"{name}.weight"] = 1 + 0.25 * torch.randn(hidden, generator=generator)
        weights[f"{name}.bias"] = 0.2 * torch.randn(hidden, generator=generator)
    return weights
