"""Fixtures of the tests that start ranks."""

from pathlib import Path

import pytest

from data_pipeline.sentencepiece_tokenizer import train_tokenizer
from tests.support.layouts import VOCABULARY


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with the vocabulary size of the layout runs."""
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    words = ["".join(chr(97 + (i * k) % 26) for k in range(1, 9)) for i in range(1, 400)]
    train_tokenizer([" ".join(words)] * 20, vocab_size=VOCABULARY, out=out)
    return out
