"""Write tokens as Megatron's .bin/.idx, with numpy alone: megatron-core's own builder takes seconds to import."""

from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.files import whole_file
from data_pipeline.indexed import smallest_dtype, write_index
from data_pipeline.prefixes import bin_path, idx_path, words_path
from data_pipeline.sources import Chunk
from data_pipeline.tokenizer import Tokenizer

_ENCODED_AT_ONCE = 1 << 21  # characters: enough to keep all cores busy


def write_part(chunks: Iterable[Chunk], *, tokenizer: Tokenizer, prefix: Path) -> None:
    """Write `prefix`.bin, .idx and .words.npy: one sequence per chunk, the end token after the last of a document.

    No file gets its name before all are complete. The .words.npy holds the number of words (separated by white space)
    of each sequence, for the perplexity per word.

    Raises:
        InputError: what `chunks` raises.
    """
    words, lengths, document_ends = array("q"), array("i"), array("q")  # a list of numbers takes four times the memory
    dtype = smallest_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_document], dtype)
    with ExitStack() as files:
        # contexts exit in reverse: the .bin, entered first, gets its name last
        tokens_file = files.enter_context(whole_file(bin_path(prefix)))
        index_file = files.enter_context(whole_file(idx_path(prefix)))
        words_file = files.enter_context(whole_file(words_path(prefix)))
        with tokens_file.open("wb") as file:
            for chunk, ids in _encoded(move_cuts(chunks, tokenizer), tokenizer):
                file.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids) + chunk.ends_document)
                words.append(len(chunk.text.split()))
                if chunk.ends_document:
                    file.write(end.tobytes())
                    document_ends.append(len(lengths))
        write_index(index_file, dtype=dtype, lengths=lengths, document_ends=document_ends)
        with words_file.open("wb") as file:
            np.save(file, np.array(words, np.int64))


def move_cuts(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Yield chunks cut where the tokenizer allows it: joined, their ids are those of the whole document."""
    rest = ""
    for chunk in chunks:
        text = rest + chunk.text
        cut = len(text) if chunk.ends_document else tokenizer.last_cut(text)
        rest = text[cut:]
        yield Chunk(text[:cut], chunk.ends_document)


def _encoded(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> Iterator[tuple[Chunk, NDArray[np.int32]]]:
    """Yield each chunk with its tokens. A thread encodes while this one reads on and writes what came before."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        started = (
            (batch, thread.submit(tokenizer.encode_each, [chunk.text for chunk in batch])) for batch in _batches(chunks)
        )
        before = None
        for now in chain(started, [None]):
            if before is not None:
                batch, ids = before
                yield from zip(batch, ids.result(), strict=True)
            before = now


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    batch, characters = [], 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk.text)
        if characters >= _ENCODED_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
