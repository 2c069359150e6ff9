"""Text from an exported folder, made by transformers alone: the proof that the export serves."""

from pathlib import Path

import torch
import transformers

from configs.errors import InputError
from training.export.parity import load_exported, quiet_transformers


def generate_text(folder: Path, *, prompt: str, tokens: int) -> str:
    """Return a prompt and its likeliest continuation, token by token.

    Args:
        folder: A folder that `export` wrote.
        prompt: Text to continue; empty for the start of a document.
        tokens: New tokens at most; the end of the document may come earlier.
    Raises:
        InputError: the folder holds no exported model, or tokens is below 1.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no exported model: give a folder that `trainshort export` wrote")
    if tokens < 1:
        raise InputError(f"tokens to generate must be 1 or more, got {tokens}")
    model = load_exported(folder)
    with quiet_transformers(), torch.no_grad():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # documents follow each other in training, so the end of one is where the next begins
        ids = tokenizer(prompt, split_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id]
        inputs = torch.tensor([ids])
        outputs = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(outputs[0].tolist(), skip_special_tokens=True))
