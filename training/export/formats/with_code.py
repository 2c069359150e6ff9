"""Hugging Face format with code: a folder that carries its own modelling code, for any model and any type of weights.

Transformers runs BLOOM slowly, and wrong in 16 bits; see docs/export.md. The code is in `carried`.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from configs.choices import FAMILIES
from configs.errors import InputError
from configs.schema import Model
from training.export.formats.carried import modeling_trainshort
from training.export.formats.carried.modeling_trainshort import (
    TrainshortConfig,
    TrainshortForCausalLM,
)
from training.export.formats.family_limits import carried_code_problem
from training.export.formats.huggingface import HuggingFaceFormat, TransformersModel, load_exported
from training.export.formats.huggingface_config import save_configuration, token_ids
from training.export.formats.readers import TRANSFORMERS_WITH_CODE, Reader
from training.export.formats.safetensors_folder import write_safetensors
from training.export.formats.table import LengthLimit
from training.export.formats.tokenizer_json import write_tokenizer
from training.families.description import Family
from training.families.table import describe

_CODE = Path(modeling_trainshort.__file__)


class WithCodeFormat(HuggingFaceFormat):
    """Implement `ExportFormat` for the model class that the folder carries."""

    def reader(self, model: Model) -> Reader:
        """Return what the cards say of transformers with this code."""
        return TRANSFORMERS_WITH_CODE

    def check(self, model: Model) -> None:
        """Refuse a position method that the code does not know: one that was added to this version."""
        if (problem := carried_code_problem(model)) is not None:
            raise InputError(problem)

    def write(
        self,
        folder: Path,
        *,
        name: str,
        weights: Mapping[str, Tensor],
        model: Model,
        vocab_size: int,
        tokenizer: Path,
        sequence_length: int,
        longest: int,
    ) -> None:
        """Write code, configuration and tokenizer, and one file of weights after the other; see `ExportFormat`.

        Raises:
            InputError: the tokenizer cannot be written with the same ids, or has more pieces than the embedding rows.
        """
        special_ids = write_tokenizer(tokenizer, folder, rows=vocab_size)
        shutil.copyfile(_CODE, folder / _CODE.name)
        settings = _architecture(model, vocab_size=vocab_size) | token_ids(special_ids)
        config = TrainshortConfig(
            **settings,
            architectures=[TrainshortForCausalLM.__name__],
            auto_map={
                "AutoConfig": f"{_CODE.stem}.{TrainshortConfig.__name__}",
                "AutoModelForCausalLM": f"{_CODE.stem}.{TrainshortForCausalLM.__name__}",
            },
            dtype=self._dtype,
            train_length=sequence_length,
            seq_length=longest,
        )
        save_configuration(config, folder, special_ids=special_ids)
        with torch.device("meta"):  # no memory
            shards = (parameter.shard for parameter in describe(model, vocab_size=vocab_size))
            planned = {shard.name: torch.empty(shard.shape, dtype=self._dtype) for shard in shards}
        write_safetensors(folder, planned, read=weights.__getitem__, shard_bytes=self._shard_bytes)

    def length_limit(self, model: Model) -> LengthLimit:
        """Return no limit: the memory of the code's attention grows with the length, as ours does."""
        return LengthLimit(tokens=sys.maxsize, reason="there is no limit")

    def read_logits(self, folder: Path) -> TransformersModel:
        """Return the folder's model, run by the code in it in fp32; see `ExportFormat`."""
        return TransformersModel(load_exported(folder, loader=carried_class(folder)))


def carried_class(folder: Path) -> Any:
    """Return the model class of the code in a folder.

    AutoModelForCausalLM runs the same file, but from a copy that it leaves in the user's home.
    """
    file = folder / _CODE.name
    module = ModuleType(file.stem)
    exec(compile(file.read_text(encoding="utf-8"), file, "exec"), vars(module))  # an import would write __pycache__
    return getattr(module, TrainshortForCausalLM.__name__)


def _architecture(model: Model, *, vocab_size: int) -> dict[str, Any]:
    family: Family = FAMILIES[model.family].load()
    return {
        "vocab_size": vocab_size,
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "feed_forward": model.inner,
        "position": model.position,
        "alibi_bias_max": model.alibi_bias_max,
        "window": model.window,
        "biases": family.biases,
        "embedding_norm": family.embedding_norm,
        "activation": family.activation,
        "norm_epsilon": family.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "dropout": model.dropout,
    }
