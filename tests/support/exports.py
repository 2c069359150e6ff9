"""A tokenizer and weights small enough to export in less than a second."""

from collections.abc import Mapping
from pathlib import Path

import sentencepiece
import torch
from hypothesis import strategies as st

from configs.schema import Model
from parallel.parameter import Shard
from training.export.formats.table import ExportFormat
from training.families.table import shards_of

HARD_WORDS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.integers(1, 30).map(lambda count: " " * count),
    st.sampled_from(["<s>", "</s>", "<unk>", "<0x41>", "the ", " of", "\n", "\t", "\r\n", "\x00", "=====", "é"]),
)
"""Parts of texts in which tokenizers may differ: any Unicode, runs of spaces, control words spelled out."""

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
    weights: Mapping[str, torch.Tensor],
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

    def weight(shard: Shard) -> torch.Tensor:
        values = torch.randn(shard.shape, generator=generator)
        if shard.rule == "vocabulary":
            return 0.3 * values
        if values.ndim > 1:
            return values * 1.2 / values.shape[1] ** 0.5
        return shard.constant + (0.25 if shard.constant else 0.2) * values

    return {name: weight(shard) for name, shard in shards_of(shape, vocab_size=vocab_size).items()}
