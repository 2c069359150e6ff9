"""Write tokens as Megatron's .bin/.idx, with megatron-core's builder. Imports torch: import it only when needed."""

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from configs.files import whole_file
from data_pipeline.prefixes import bin_path, idx_path, words_path
from data_pipeline.sources import Chunk
from data_pipeline.tokenizer import Tokenizer

with warnings.catch_warnings():
    # megatron-core warns that optional GPU libraries are missing; writing tokens needs none
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


def write_part(chunks: Iterable[Chunk], *, tokenizer: Tokenizer, prefix: Path) -> None:
    """Write `prefix`.bin, .idx and .words.npy: one sequence per chunk, the end token after the last of a document.

    No file gets its name before all are complete. The .words.npy holds the number of words (separated by white space)
    of each sequence, for the perplexity per word.

    Raises:
        InputError: what `chunks` raises.
    """
    words = []
    with ExitStack() as files:
        # contexts exit in reverse: the .bin, entered first, gets its name last
        tokens_file = files.enter_context(whole_file(bin_path(prefix)))
        index_file = files.enter_context(whole_file(idx_path(prefix)))
        words_file = files.enter_context(whole_file(words_path(prefix)))
        # optimal_dtype: uint16 where the vocabulary allows, else int32
        builder = IndexedDatasetBuilder(str(tokens_file), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        # the builder closes its file only in finalize, which an error skips
        files.callback(builder.data_file.close)
        for chunk in chunks:
            tokens = tokenizer.encode(chunk.text)
            if chunk.ends_document:
                tokens.append(tokenizer.end_of_document)
            builder.add_item(torch.tensor(tokens, dtype=torch.int64))
            words.append(len(chunk.text.split()))
            if chunk.ends_document:
                builder.end_document()
        builder.finalize(str(index_file))
        with words_file.open("wb") as file:
            np.save(file, np.array(words, np.int64))
