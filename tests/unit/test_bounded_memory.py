"""What an evaluation holds of a text does not grow with the text; what `prepare` holds, by some bytes a document."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline import text as text_module
from data_pipeline.sources import Chunk
from data_pipeline.storage import write_part
from data_pipeline.text import file_stream, identify_text
from tests.support.evaluation import UniformModel, measure

SIZES = (3_000_000, 9_000_000)


class Letters(SimpleNamespace):
    """A tokenizer whose tokens are the bytes of a text."""

    vocab_size, end_of_document = 256, 0

    def encode_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's bytes."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def last_cut(self, text: str) -> int:
        """Cut anywhere."""
        return len(text)

    def spell(self, ids: Sequence[int]) -> bytes:
        """Return the text of its bytes."""
        return bytes(ids)


def held_while_evaluating(file: Path) -> int:
    """Return the most bytes that Python and numpy held at a time while a file was read, identified and scored."""
    tracemalloc.start()
    stream = file_stream(file, file)
    assert identify_text(stream.tokens, file).bytes == len(stream.tokens) == file.stat().st_size
    for protocol in ("nonoverlapping", "last:8"):
        result = measure(UniformModel(), stream.tokens, length=4096, protocol=protocol, documents=stream.documents)
        assert result.tokens > len(stream.tokens) // 1000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_a_longer_text_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "load_tokenizer", lambda _: Letters())
    held = []
    for size in SIZES:
        (tmp_path / "text.txt").write_bytes((b"w" * 99 + b" ") * (size // 100))
        held.append(held_while_evaluating(tmp_path / "text.txt"))
    # The windows: some numbers each. Token ids take eight bytes each in a tensor, two in the file.
    assert held[1] - held[0] < (SIZES[1] - SIZES[0]) / 4, held


def test_a_document_takes_few_bytes_of_memory(tmp_path: Path) -> None:
    held = []
    for documents in (8_000, 16_000):  # several batches each
        chunks = (Chunk("a " * 300, ends_document=True) for _ in range(documents))
        tracemalloc.start()
        write_part(chunks, tokenizer=Letters(), prefix=tmp_path / "part")
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert held[1] - held[0] < 60 * 8_000, held
