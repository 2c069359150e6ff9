"""Models of Hugging Face with random weights, saved as transformers or their authors save them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

ROWS = 405
SHAPE = {"hidden_size": 48, "seq_length": 32, "bos_token_id": 1, "eos_token_id": 2}


def _random_model(kind: str, *, rows: int) -> BloomForCausalLM | MptForCausalLM:
    """Return transformers' model of six heads with random weights, none of them as they begin."""
    torch.manual_seed(3)
    ties: Any = {**SHAPE, "vocab_size": rows, "tie_word_embeddings": "untied" not in kind}
    if kind.startswith("mpt"):
        attention = {"alibi_bias_max": 5 if "steep" in kind else 8}
        config = MptConfig(n_layers=2, n_heads=6, max_seq_len=32, attn_config=attention, **ties)
        model: BloomForCausalLM | MptForCausalLM = MptForCausalLM(config)
    else:
        model = BloomForCausalLM(BloomConfig(n_layer=2, n_head=6, **ties))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()  # type: ignore[no-untyped-call, no-any-return]


def save_random(folder: Path, kind: str, *, tokenizer: Path, rows: int = ROWS, shards: str = "1GB") -> Path:
    """Save a random model of a kind as transformers does, with a tokenizer; return the folder.

    Args:
        folder: A new folder.
        kind: bloom or mpt, and what differs: untied, steep.
        tokenizer: A sentencepiece model.
        rows: Rows of its embedding.
        shards: The largest file of weights.
    """
    _random_model(kind, rows=rows).save_pretrained(folder, max_shard_size=shards)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


MUP = {"mup_embeddings_scale": 9.1, "mup_output_alpha": 2.0, "mup_width_scale": 0.25, "mup_scale_qk_dot_by_d": True}
OLD_MUP = {"embeddings_scale": 9.1, "width_scale": 0.5, "scale_qk_dot_by_d": True}


def save_jais(folder: Path, *, tokenizer: Path, ties: bool = True, **keys: Any) -> dict[str, Tensor]:
    """Save a random Jais of two blocks and six heads as its authors do, with a tokenizer; return its weights.

    Args:
        folder: A new folder.
        tokenizer: A sentencepiece model.
        ties: Whether the head shares the word embedding.
        keys: More of config.json.
    """
    hidden, inner = SHAPE["hidden_size"], 100
    shapes = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    shapes |= {"mlp.c_fc": (hidden, inner), "mlp.c_fc2": (hidden, inner), "mlp.c_proj": (inner, hidden)}
    torch.manual_seed(3)
    weights = {"transformer.wte.weight": torch.randn(ROWS, hidden) / 4}
    for block in range(2):
        for name, shape in shapes.items():
            weights[f"transformer.h.{block}.{name}.weight"] = torch.randn(shape) / 4
            weights[f"transformer.h.{block}.{name}.bias"] = torch.randn(shape[1]) / 4
    for name in (*(f"h.{block}.ln_{number}" for block in range(2) for number in (1, 2)), "ln_f"):
        weights[f"transformer.{name}.weight"] = 1 + torch.randn(hidden) / 4
        weights[f"transformer.{name}.bias"] = torch.randn(hidden) / 4
    if not ties:
        weights["lm_head.weight"] = torch.randn(ROWS, hidden) / 4
    config = {"model_type": "jais", "n_embd": hidden, "n_layer": 2, "n_head": 6, "n_inner": inner, "n_positions": 32}
    config |= {"activation_function": "swiglu", "position_embedding_type": "alibi", "vocab_size": ROWS}
    config |= {"tie_word_embeddings": ties, "bos_token_id": 1, "eos_token_id": 2, "layer_norm_epsilon": 1e-5, **keys}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return weights


def jais_by_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Jais's weights in fp64 by our names, as they are but for the orders of rows and dimensions."""
    names = {"ln_1": "attention_norm", "ln_2": "feed_forward_norm", "attn.c_proj": "attention.output"}
    names |= {"mlp.c_fc": "feed_forward.up", "mlp.c_fc2": "feed_forward.gate", "mlp.c_proj": "feed_forward.down"}
    ours = {}
    for name, weight in weights.items():
        place, _, part = name.removeprefix("transformer.").rpartition(".")
        wide = weight.double()
        if place.startswith("h."):
            _, block, module = place.split(".", 2)
            wide = wide.T if wide.ndim == 2 else wide
            if module == "attn.c_attn":
                by_part = wide.reshape(3, 6, -1, *wide.shape[1:])
                module, wide = "attention.query_key_value", by_part.transpose(0, 1).reshape(wide.shape)
            place = f"blocks.{block}.{names.get(module, module)}"
        place = {"wte": "embedding.word", "ln_f": "final_norm", "lm_head": "head"}.get(place, place)
        ours[f"{place}.{part}"] = wide.contiguous()
    return ours
