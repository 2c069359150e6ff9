"""A byte-level tokenizer.json trained in milliseconds, with the words of GPT-2 (as MPT's) or of BLOOM."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.data import BOOK

VOCABULARY = 380
_BLOOM_WORDS = Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+")


def train_byte_level(folder: Path, *, bloom: bool = False, end: str = "<|endoftext|>", **config: object) -> Path:
    """Train on the book and write tokenizer.json to a folder; return the folder.

    Args:
        folder: Made if it does not exist.
        bloom: Whether to split text into words as BLOOM does.
        end: Its special token.
        config: Content of tokenizer_config.json; without any there is no such file.
    """
    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(_BLOOM_WORDS, "isolated"), bytes_only])
        if bloom
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spaced = BOOK[:50_000].replace("\n", "\n\n\n   ")  # so that it has tokens of several newlines and of both
    tokenizer.train_from_iterator([BOOK[:50_000], spaced], trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=True), AddedToken("   ", normalized=True)])  # as GPT-NeoX has
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def change_json(file: Path, **keys: object) -> None:
    """Set keys of a JSON object in a file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
