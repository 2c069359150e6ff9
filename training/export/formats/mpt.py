"""Transformers' MptForCausalLM: a GGUF file read into it, and its slopes. It does neither by itself."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import dequantize
from transformers import MptConfig, MptForCausalLM
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from configs.errors import TrainshortError
from configs.schema import Model
from training.export.parity import COMPARED_MULTIPLE
from training.families.mpt import MPT
from training.families.table import describe


def load_mpt(file: Path) -> Any:
    """Return the file's model in fp32.

    Raises:
        TrainshortError: the file lacks a weight, or has one that the model does not know.
    """
    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, hidden, layers = (field(f"mpt.{key}") for key in ("attention.head_count", "embedding_length", "block_count"))
    longest = max(field("mpt.context_length"), COMPARED_MULTIPLE * field("trainshort.train_length"))
    ties = all(each.name != "output.weight" for each in reader.tensors)
    model = Model(layers=layers, hidden=hidden, heads=heads, family=MPT.name, tie_embeddings=ties)
    names = {each.gguf: str(each.huggingface) for each in describe(model, vocab_size=field("mpt.vocab_size"))}
    if wrong := sorted(names.keys() ^ {each.name for each in reader.tensors}, key=str):
        raise TrainshortError(
            f"the GGUF file lacks these weights, or has them and should not: {wrong[:5]}; report this"
        )
    config = MptConfig(
        d_model=hidden,
        n_layers=layers,
        n_heads=heads,
        max_seq_len=longest,
        vocab_size=field("mpt.vocab_size"),
        layer_norm_epsilon=field("mpt.attention.layer_norm_epsilon"),
        tie_word_embeddings=ties,
    )
    mpt: Any = MptForCausalLM(config)  # its eval is untyped
    with torch.no_grad():
        for each in reader.tensors:
            mpt.get_parameter(names[each.name]).copy_(torch.tensor(dequantize(each.data, each.tensor_type)))
    return with_slopes(mpt.eval(), field("mpt.attention.max_alibi_bias"))


def with_slopes(model: Any, bias_max: float) -> Any:
    """Return transformers' model with the slopes of a value of alibi_bias_max: its Mpt computes with 8 by itself."""
    if isinstance(model, MptForCausalLM):
        builds: Any = model.transformer
        builds.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=bias_max)
    return model
