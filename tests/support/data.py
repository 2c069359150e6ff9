"""A small text and its data section."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from configs.schema import Data, Source

BOOK = "\n".join(topics[name] for name in sorted(topics)[:30])


def small_data(*paths: Path | str | tuple[Path | str, float], **values: Any) -> Data:
    """Return a data section of sources: paths, or (path, weight) for a blend."""
    pairs = [path if isinstance(path, tuple) else (path, None) for path in paths]
    sources = tuple(Source(path=str(path), weight=weight) for path, weight in pairs)
    return Data(**{"sources": sources, "vocab_size": 600, "sequence_length": 16, "split": 0.1} | values)


def write_book(folder: Path, name: str = "book.txt", *, text: str = BOOK) -> Path:
    """Write a text file."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file
