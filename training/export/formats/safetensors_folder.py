"""Weights as safetensors files, written one after the other, so that a large model is never whole in memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5_000_000_000
"""The most bytes of weights in a file, and so in memory; a larger tensor has a file of its own."""


def write_safetensors(
    folder: Path, planned: Mapping[str, Tensor], *, read: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write weights as model.safetensors, or as several files and model.safetensors.index.json.

    Args:
        folder: A folder that exists.
        planned: Tensors on the meta device, by name: shapes and types in the files.
        read: Returns a tensor by its name, in any type; called once for each, file by file.
        shard_bytes: The most bytes of weights in a file.
    """
    split = split_torch_state_dict_into_shards(dict(planned), max_shard_size=shard_bytes)

    def converted(name: str) -> Tensor:
        weight, plan = read(name), planned[name]
        assert weight.shape == plan.shape, f"{name} is {list(weight.shape)}, planned {list(plan.shape)}"
        return weight.to(plan.dtype).contiguous()

    for file, names in split.filename_to_tensors.items():
        save_file({name: converted(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(f"{text}\n", encoding="utf-8")
