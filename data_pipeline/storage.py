"""Write tokens in Megatron's format, through megatron-core's builder. Imports torch: import it when needed."""

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from configs.files import whole_file
from data_pipeline.indexed import bin_path, idx_path, words_path
from data_pipeline.sources import Chunk
from data_pipeline.tokenizer import Tokenizer

with warnings.catch_warnings():
    # megatron-core tells that optional GPU libraries are missing, which writing tokens does not need
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


def write_part(pieces: Iterable[Chunk], *, tokenizer: Tokenizer, prefix: Path) -> None:
    """Write `prefix`.bin, .idx and .words.npy: a sequence a piece, the end token after a document's last.

    Nothing with these names is there before all of it is. The words of each sequence (white space separated) are
    kept so that perplexity can be given per word.

    Raises:
        InputError: what `pieces` raises.
    """
    words = []
    with ExitStack() as files:
        # the last to get its name is the .bin: it is entered first
        tokens_file = files.enter_context(whole_file(bin_path(prefix)))
        index_file = files.enter_context(whole_file(idx_path(prefix)))
        words_file = files.enter_context(whole_file(words_path(prefix)))
        builder = IndexedDatasetBuilder(str(tokens_file), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        # the builder closes its file only when it finishes
        files.callback(builder.data_file.close)
        for piece in pieces:
            tokens = tokenizer.encode(piece.text)
            if piece.last:
                tokens.append(tokenizer.end_of_document)
            builder.add_item(torch.tensor(tokens, dtype=torch.int64))
            words.append(len(piece.text.split()))
            if piece.last:
                builder.end_document()
        builder.finalize(str(index_file))
        with words_file.open("wb") as file:
            np.save(file, np.array(words, np.int64))
