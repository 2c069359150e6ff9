"""The weights of a GGUF file by their names in Hugging Face's format."""

from collections.abc import Iterator
from typing import Any

import torch
from gguf.quants import dequantize
from torch import Tensor

from configs.errors import TrainshortError
from configs.schema import Model
from training.families.table import describe


def gguf_weights(reader: Any, model: Model, *, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the fp32 weight of each tensor, one in memory at a time.

    Args:
        reader: gguf's `GGUFReader` of the file.
        model: The shape of its model.
        vocab_size: Rows of the word embedding.
    Raises:
        TrainshortError: the file lacks a weight, or has one that the model does not know.
    """
    names = {each.gguf: str(each.huggingface) for each in describe(model, vocab_size=vocab_size)}
    if wrong := sorted(names.keys() ^ {each.name for each in reader.tensors}, key=str):
        raise TrainshortError(
            f"the GGUF file lacks these weights, or has them and should not: {wrong[:5]}; report this"
        )
    for each in reader.tensors:
        yield names[each.name], torch.tensor(dequantize(each.data, each.tensor_type))
