"""Transformers' MptForCausalLM: a GGUF file read into it, and its slopes. It does neither by itself."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import MptConfig, MptForCausalLM
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from configs.schema import Model
from training.export.formats.gguf_weights import gguf_weights
from training.export.parity import COMPARED_MULTIPLE
from training.families.mpt import MPT


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
        for name, weight in gguf_weights(reader, model, vocab_size=field("mpt.vocab_size")):
            mpt.get_parameter(name).copy_(weight)
    return with_slopes(mpt.eval(), field("mpt.attention.max_alibi_bias"))


def with_slopes(model: Any, bias_max: float) -> Any:
    """Return transformers' model with the slopes of a value of alibi_bias_max: its Mpt computes with 8 by itself."""
    if isinstance(model, MptForCausalLM):
        builds: Any = model.transformer
        builds.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=bias_max)
    return model
