"""A trained model as a folder that transformers and vLLM load: BloomForCausalLM."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig

from configs.errors import InputError
from configs.schema import Model
from data_pipeline.vocabulary import Vocabulary
from training.export.formats.tokenizer_json import write_tokenizer

# an exported model's logits are compared up to this many times the training length
LONGEST_COMPARED = 4

_TOP = {
    "embedding.word.weight": "word_embeddings.weight",
    "embedding.norm": "word_embeddings_layernorm",
    "final_norm": "ln_f",
}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query_key_value": "self_attention.query_key_value",
    "attention.output": "self_attention.dense",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}


def require_bloom(model: Model) -> None:
    """Refuse what BloomForCausalLM cannot express, every point of it by name.

    Raises:
        InputError: names each key, its value, and what the format holds.
    """
    wrong = []
    if model.family != "bloom":
        wrong.append(f"model.family {model.family} (it holds bloom)")
    if model.position != "alibi":
        wrong.append(f"model.position {model.position} (it holds alibi)")
    if model.inner != 4 * model.hidden:
        wrong.append(f"model.feed_forward {model.inner} (it holds 4 x hidden, {4 * model.hidden})")
    if wrong:
        raise InputError(f"the Hugging Face Bloom format cannot hold {'; '.join(wrong)}: this model cannot be exported")


def fill_folder(
    folder: Path,
    *,
    weights: Mapping[str, torch.Tensor],
    model: Model,
    vocab_size: int,
    tokenizer: Path,
    sequence_length: int,
) -> None:
    """Write the files of a Hugging Face model into a folder that exists."""
    pieces = write_tokenizer(tokenizer, folder)
    if len(pieces) > vocab_size:
        raise InputError(
            f"tokenizer {tokenizer} has {len(pieces)} pieces, the model's embedding {vocab_size} rows: "
            "give the tokenizer that the model was trained with"
        )
    config = _config(model, vocab_size=vocab_size, sequence_length=sequence_length, pieces=pieces)
    config.save_pretrained(folder)
    generation: Any = GenerationConfig  # untyped in transformers
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    generation(**ids).save_pretrained(folder)
    renamed = {huggingface_name(name): weight.contiguous() for name, weight in weights.items()}
    _require_whole(renamed, config)
    # the head is the word embedding: written once, tied again when loaded
    save_torch_state_dict(renamed, folder, max_shard_size="5GB", metadata={"format": "pt"})


def huggingface_name(name: str) -> str:
    """Return a parameter's name in BloomForCausalLM.

    Raises:
        ValueError: no parameter of the bloom family has this logical name.
    """
    if name in _TOP:
        return f"transformer.{_TOP[name]}"
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is not None:
        block, layer, kind = match.groups()
        names, prefix = (_TOP, "transformer") if block is None else (_BLOCK, f"transformer.h.{block}")
        if layer in names:
            return f"{prefix}.{names[layer]}.{kind}"
    raise ValueError(f"parameter {name} has no place in BloomForCausalLM")


def _require_whole(weights: Mapping[str, torch.Tensor], config: BloomConfig) -> None:
    """Compare names and shapes with those of the model that transformers makes of the configuration."""
    with torch.device("meta"):
        wanted = {name: weight.shape for name, weight in BloomForCausalLM(config).state_dict().items()}
    del wanted["lm_head.weight"]
    found = {name: weight.shape for name, weight in weights.items()}
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    assert not differing, f"weights that do not fit BloomForCausalLM: {differing[:5]}"


def _config(model: Model, *, vocab_size: int, sequence_length: int, pieces: Vocabulary) -> BloomConfig:
    settings: dict[str, Any] = {
        "architectures": ["BloomForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": model.init_std,
        "hidden_dropout": model.dropout,
        "attention_dropout": 0.0,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "bos_token_id": pieces.begin_id,
        "eos_token_id": pieces.end_id,
        "pad_token_id": pieces.pad_id if pieces.pad_id is not None else pieces.end_id,
        "dtype": "float32",
        # transformers sets no limit; engines that do read seq_length, and ALiBi is there to go past the training
        # length: as far as an export is compared
        "seq_length": LONGEST_COMPARED * sequence_length,
        "train_length": sequence_length,
    }
    return BloomConfig(**settings)
