"""Hugging Face format: a folder that transformers loads as BloomForCausalLM or MptForCausalLM, and vLLM the first.

`HuggingFaceFormat` writes the folder and reads it back with transformers. `generate_text` generates from the folder
with transformers alone, which shows that the export can be served.
"""

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from configs.choices import FAMILIES
from configs.errors import InputError, TrainshortError, in_brief
from configs.schema import Model
from parallel.parameter import Shard
from training.export.format_weights import in_format
from training.export.formats.family_limits import huggingface_problem
from training.export.formats.huggingface_config import make_config, save_configuration
from training.export.formats.readers import MPT_IN_TRANSFORMERS, TRANSFORMERS, UNTIED_IN_TRANSFORMERS, Reader
from training.export.formats.rounding import finite
from training.export.formats.safetensors_folder import SHARD_BYTES, write_safetensors
from training.export.formats.table import LengthLimit
from training.export.formats.tokenizer_json import write_tokenizer
from training.export.parity import COMPARED_MULTIPLE
from training.families.mpt import MPT
from training.families.table import describe
from training.model.proof.attention_weights import dtype_of
from training.out_of_memory import memory_error

# Transformers' Bloom and Mpt materialize the attention scores of a layer, [heads, seq, seq] fp32.
_MOST_SCORE_BYTES = 2_000_000_000
# what it raises at a folder that it cannot load
_BAD_CONFIGURATION = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
_BAD_WEIGHTS = (EOFError, RuntimeError, SafetensorError)


class HuggingFaceFormat:
    """Implement `ExportFormat` for transformers' class of the family, which reads it back and computes in fp32."""

    file = ""

    def __init__(self, dtype: str = "fp32", *, shard_bytes: int = SHARD_BYTES) -> None:
        """Take the type of the weights, fp32, bf16 or fp16, and the most bytes of them in a file."""
        self.dtype, self._dtype, self._shard_bytes = dtype, dtype_of(dtype), shard_bytes
        self.bytes_per_weight = float(self._dtype.itemsize)

    def check(self, model: Model) -> None:
        """Refuse a model that the class cannot express; see `ExportFormat`."""
        if problem := huggingface_problem(model):
            raise InputError(problem)

    def rounded(self, weight: Tensor, shard: Shard, *, model: Model) -> Tensor:
        """Return a weight as the written model has it; see `ExportFormat`."""
        return finite(weight.to(self._dtype).float(), weight=weight, dtype=self.dtype)

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
        """Write configuration and tokenizer, and one file of weights after the other; see `ExportFormat`.

        Raises:
            InputError: the tokenizer cannot be written with the same ids, or has more pieces than the embedding rows.
        """
        special_ids = write_tokenizer(tokenizer, folder, rows=vocab_size)
        config = make_config(
            model,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            longest=longest,
            special_ids=special_ids,
            compared=COMPARED_MULTIPLE * sequence_length,
        )
        save_configuration(config, folder, special_ids=special_ids)
        described = {each.shard.name: each for each in describe(model, vocab_size=vocab_size)}
        parameters = {str(described[name].huggingface): described[name] for name in weights}
        planned, family = _planned(config), FAMILIES[model.family].load()
        differing = sorted(planned.keys() ^ parameters.keys())
        assert not differing, f"weights that do not fit transformers' class: {differing[:5]}"
        write_safetensors(
            folder,
            {name: tensor.to(self._dtype) for name, tensor in planned.items()},
            read=lambda name: in_format(family.huggingface, parameters[name], weights, model=model),
            shard_bytes=self._shard_bytes,
        )

    def reader(self, model: Model) -> Reader:
        """Return what the cards say of transformers and vLLM."""
        if model.family == MPT.name:
            return MPT_IN_TRANSFORMERS
        return TRANSFORMERS if model.tie_embeddings else UNTIED_IN_TRANSFORMERS

    def length_limit(self, model: Model) -> LengthLimit:
        """Return the length at which a layer's attention scores take 2 GB; see `ExportFormat`."""
        # scores: 4 bytes x heads x seq x seq
        return LengthLimit(
            tokens=math.isqrt(_MOST_SCORE_BYTES // (4 * model.heads)),
            reason="transformers' attention scores would take over 2 GB",
        )

    def read_tokenizer(self, folder: Path) -> "HuggingFaceTokenizer":
        """Return the folder's tokenizer, loaded by transformers."""
        return HuggingFaceTokenizer(folder)

    def read_logits(self, folder: Path) -> "TransformersModel":
        """Return the folder's model, loaded by transformers in fp32; see `ExportFormat`."""
        return TransformersModel(load_exported(folder))


class HuggingFaceTokenizer:
    """The tokenizer of an exported folder.

    Attributes:
        end: Id of the token that ends a text; None if it has none.
    """

    def __init__(self, folder: Path) -> None:
        with quiet_transformers():
            # Code in the folder is the model's, not the tokenizer's: without this, transformers asks the user.
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if not {*self._tokenizer.get_vocab()} - {*self._tokenizer.all_special_tokens}:
            # of a folder without its files, transformers makes one that knows no text
            raise ValueError("none of its files are there")
        self.end: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        with quiet_transformers():
            # Without split_special_tokens, transformers parses "</s>" in a text as a token; sentencepiece never does.
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
        with quiet_transformers():
            return str(self._tokenizer.decode(ids))


class TransformersModel:
    """Implement `ExportedModel` with a model that transformers has loaded."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits of tokens, [1, seq] int64, as [1, seq, vocab] fp32."""
        logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits

    def continue_greedily(self, ids: Sequence[int], *, tokens: int, end: int) -> list[int]:
        """Return the ids of at most `tokens` new tokens, by transformers' own loop and cache; see `ExportedModel`."""
        inputs = torch.tensor([list(ids)])
        with quiet_transformers(), torch.no_grad():
            outputs: Tensor = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
                # said here, because a GGUF file's configuration lacks them
                eos_token_id=end,
                pad_token_id=end,
            )
        new: list[int] = outputs[0, len(ids) :].tolist()
        return new


def load_exported(folder: Path, *, loader: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """Return an exported folder's model as transformers loads it, in fp32.

    Args:
        folder: The folder.
        loader: The class whose `from_pretrained` loads it.
        options: More arguments for that: `gguf_file`, if one is to be read.
    Raises:
        TrainshortError: weights are missing, or transformers does not know some.
    """
    with quiet_transformers():
        model, loading = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    wrong = sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"]) + sorted(loading["mismatched_keys"])
    if wrong:
        raise TrainshortError(f"transformers cannot place these weights of the export: {wrong[:5]}; report this")
    return model.eval()


def generate_text(folder: Path, *, prompt: str, tokens: int) -> str:
    """Return a prompt and its greedy continuation, generated by transformers.

    Args:
        folder: A folder that `export` wrote.
        prompt: Text to continue; empty for the start of a document.
        tokens: New tokens at most; generation stops at the end of the document.
    Raises:
        InputError: the folder holds no exported model, or tokens is below 1.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no exported model: give a folder that `trainshort export` wrote")
    if tokens < 1:
        raise InputError(f"tokens to generate must be 1 or more, got {tokens}")
    model = TransformersModel(load_exported(folder))
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Training data is documents separated by the end token, so that token also starts a document.
        ids = tokenizer(prompt, split_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id]
        ids += model.continue_greedily(ids, tokens=tokens, end=tokenizer.eos_token_id)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def refusing_unreadable(folder: Path) -> Iterator[None]:
    """Turn what transformers raises at a folder that it cannot load into one line; memory that ran out passes.

    Raises:
        InputError: says what transformers said.
    """
    try:
        yield
    except pickle.UnpicklingError:
        raise InputError(f"{folder} has a pickle that is broken or holds more than tensors: give safetensors") from None
    except (*_BAD_CONFIGURATION, *_BAD_WEIGHTS) as error:
        if memory_error(error) is not None:
            raise
        said = in_brief(str(error).rstrip(".")) or type(error).__name__
        if isinstance(error, _BAD_WEIGHTS):
            raise InputError(f"{folder} has weights that cannot be read ({said}): download it again") from None
        raise InputError(
            f"{folder} holds no causal model that transformers {transformers.__version__} can load without code of the "
            f"folder ({said}): give another"
        ) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the standard error stream."""
    logging: Any = transformers.utils.logging  # untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _planned(config: PretrainedConfig) -> dict[str, Tensor]:
    """Return the weights of the model that transformers builds from the configuration, on the meta device."""
    builder: Any = transformers.AutoModelForCausalLM  # untyped in transformers
    with torch.device("meta"):  # no memory
        planned: dict[str, Tensor] = builder.from_config(config).state_dict()
    if config.tie_word_embeddings:  # the word embedding again, and transformers ties it when it loads
        del planned["lm_head.weight"]
    return planned
