"""Models of Hugging Face with random weights, saved as transformers saves them."""

import shutil
from pathlib import Path
from typing import Any

import torch
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
