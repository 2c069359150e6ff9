"""config.json and generation_config.json of an exported model: transformers' configuration of its family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import BloomConfig, GenerationConfig, MptConfig, PretrainedConfig

from configs.schema import Model
from training.families.bloom import BLOOM
from training.families.mpt import MPT


def make_config(
    model: Model, *, vocab_size: int, sequence_length: int, longest: int, special_ids: Mapping[str, int], compared: int
) -> PretrainedConfig:
    """Return transformers' configuration of a model.

    Args:
        model: The decoder's shape, which transformers' class can hold.
        vocab_size: Rows of the word embedding, without padding.
        sequence_length: Tokens that the model was trained at.
        longest: Tokens of the longest text that an engine should take.
        special_ids: Ids of the tokenizer's special tokens by role.
        compared: Tokens of the longest text on which the written model is compared.
    """
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        **token_ids(special_ids),
        # In 16 bits transformers' BLOOM would round the distances too.
        "dtype": "float32",
        # Transformers ignores it, but other engines limit prompt and continuation to it: vLLM's max_model_len.
        "seq_length": longest,
        "train_length": sequence_length,
    }
    if model.family == MPT.name:
        # transformers' Mpt refuses longer texts than max_seq_len, which costs it a row of biases per head.
        return _mpt_config(model, max_seq_len=max(longest, compared), **shared)
    return _bloom_config(model, **shared)


def token_ids(special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the tokens that begin, end and pad a text, as transformers' configurations name them."""
    return {
        "bos_token_id": special_ids.get("bos_token"),
        "eos_token_id": special_ids["eos_token"],
        # Padding is masked, so any token will do.
        "pad_token_id": special_ids.get("pad_token", special_ids["eos_token"]),
    }


def save_configuration(config: PretrainedConfig, folder: Path, *, special_ids: Mapping[str, int]) -> None:
    """Write config.json and generation_config.json."""
    config.save_pretrained(folder)
    generation: Any = GenerationConfig  # untyped in transformers
    generation(**token_ids(special_ids)).save_pretrained(folder)


def _bloom_config(model: Model, **shared: Any) -> BloomConfig:
    return BloomConfig(
        architectures=["BloomForCausalLM"],
        hidden_size=model.hidden,
        n_layer=model.layers,
        n_head=model.heads,
        layer_norm_epsilon=BLOOM.norm_epsilon,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        apply_residual_connection_post_layernorm=False,
        **shared,
    )


def _mpt_config(model: Model, **shared: Any) -> MptConfig:
    return MptConfig(
        architectures=["MptForCausalLM"],
        d_model=model.hidden,
        n_layers=model.layers,
        n_heads=model.heads,
        expansion_ratio=4,
        layer_norm_epsilon=MPT.norm_epsilon,
        emb_pdrop=model.dropout,
        resid_pdrop=model.dropout,
        learned_pos_emb=False,
        no_bias=True,
        attn_config={"alibi": True, "alibi_bias_max": model.alibi_bias_max},
        **shared,
    )
