"""GGUF: one file with weights and tokenizer, which llama.cpp and what is built on it run.

`GgufFormat` writes the file and reads it back: the weights into transformers' model or `JaisModel`, the tokenizer from
the file's own fields. Names and fields: llama.cpp's loaders of the architectures `bloom`, `mpt` and `jais`.
"""

from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from torch import Tensor

from configs.choices import FAMILIES
from configs.errors import InputError
from configs.schema import Model
from data_pipeline.sentencepiece_tokenizer import SentencePieceTokenizer
from data_pipeline.tokenizer_files import is_tokenizer_json
from data_pipeline.vocabulary import PieceType, Vocabulary, read_vocabulary, write_proto
from parallel.parameter import Shard
from training.export.format_weights import in_format, query_scale, scale_queries
from training.export.formats.family_limits import gguf_problem
from training.export.formats.huggingface import HuggingFaceFormat, TransformersModel, load_exported
from training.export.formats.jais import load_jais
from training.export.formats.mpt import load_mpt
from training.export.formats.readers import JAIS_IN_LLAMA_CPP, LLAMA_CPP, MPT_IN_LLAMA_CPP, Reader
from training.export.formats.rounding import finite
from training.export.formats.table import ExportedModel, LengthLimit
from training.export.formats.tokenizer_json import require_rows
from training.families.bloom import BLOOM
from training.families.description import Family, Parameter
from training.families.jais import JAIS
from training.families.mpt import MPT
from training.families.table import describe

_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32  # weights that share a scale, in one row
# llama.cpp takes pieces of these names for control tokens, whatever their type, and drops them from text.
_TAKEN = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<EOT>"),
        *("<|end_of_text|>", "<|eom_id|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<PRE>"),
        *(
            "<|fim_prefix|>",
            "<|fim_suffix|>",
            "<|fim_middle|>",
            "<|fim_pad|>",
            "<SUF>",
            "<MID>",
            "<PAD>",
            "<end_of_utterance>",
        ),
    }
)


_READERS = {MPT.name: MPT_IN_LLAMA_CPP, JAIS.name: JAIS_IN_LLAMA_CPP}


class GgufFormat:
    """Implement `ExportFormat` for llama.cpp's architectures `bloom`, `mpt` and `jais`."""

    def __init__(self, dtype: str) -> None:
        """Take the type of the matrices: f32, f16 or q8_0; norms and biases are f32 in each."""
        self.dtype = dtype
        self._type, self._file_type = _TYPES[dtype]
        block, size = gguf.GGML_QUANT_SIZES[self._type]
        self.bytes_per_weight = size / block
        self.file = f"model-{self._type.name}.gguf"

    def check(self, model: Model) -> None:
        """Refuse a model that the file cannot hold; see `ExportFormat`."""
        if problem := gguf_problem(model):
            raise InputError(problem)
        for key, width in {"hidden": model.hidden, "feed_forward": model.inner}.items():
            if self._type is GGMLQuantizationType.Q8_0 and width % _Q8_BLOCK:
                raise InputError(
                    f"q8_0 needs rows of a multiple of {_Q8_BLOCK}, and model.{key} is {width}: export in f16"
                )

    def rounded(self, weight: Tensor, shard: Shard, *, model: Model) -> Tensor:
        """Return a weight as the file has it, but for the order and the scale of its rows; see `ExportFormat`."""
        if weight.ndim == 1:
            return finite(weight, weight=weight, dtype=self.dtype)
        scale = 1.0 if shard.heads is None else query_scale(FAMILIES[model.family].load().gguf, model)
        stored = self._stored(scale_queries(weight, model=model, by=scale))
        rounded = scale_queries(torch.from_numpy(dequantize(stored, self._type)), model=model, by=1 / scale)
        return finite(rounded, weight=weight, dtype=self.dtype)

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
        """Write the file, one tensor at a time; see `ExportFormat`.

        Raises:
            InputError: the tokenizer has more pieces than the embedding rows, or one that llama.cpp takes for its own.
        """
        if is_tokenizer_json(tokenizer):
            raise InputError(
                f"format gguf cannot hold {tokenizer}: llama.cpp does not know the rule by which this tokenizer "
                "splits text into words; export to hf"
            )
        vocabulary = read_vocabulary(tokenizer)
        _check_vocabulary(vocabulary, tokenizer=tokenizer, rows=vocab_size)
        writer = gguf.GGUFWriter(folder / self.file, model.family)
        writer.add_name(name)
        writer.add_file_type(self._file_type)
        writer.add_context_length(longest)
        writer.add_uint32("trainshort.train_length", sequence_length)
        _add_shape(writer, model, vocab_size=vocab_size)
        _add_vocabulary(writer, vocabulary, rows=vocab_size)
        tensors, family = _tensors(model, vocab_size=vocab_size), FAMILIES[model.family].load()
        for name, each in tensors:
            shape = each.shard.shape
            kind = GGMLQuantizationType.F32 if len(shape) == 1 else self._type
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = int(np.prod(shape)) // block * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, each in tensors:
            writer.write_tensor_data(self._stored(in_format(family.gguf, each, weights, model=model)))
        writer.close()

    def reader(self, model: Model) -> Reader:
        """Return what the cards say of llama.cpp."""
        return _READERS.get(model.family, LLAMA_CPP)

    def length_limit(self, model: Model) -> LengthLimit:
        """Return transformers' limit, which reads the file back; see `ExportFormat`."""
        return HuggingFaceFormat().length_limit(model)

    def read_tokenizer(self, folder: Path) -> SentencePieceTokenizer:
        """Return the tokenizer that the file's fields describe."""
        return read_gguf_tokenizer(folder / self.file)

    def read_logits(self, folder: Path) -> ExportedModel:
        """Return the file's model in fp32, in transformers if that has a class for it; see `ExportFormat`."""
        architecture = gguf.GGUFReader(folder / self.file).fields["general.architecture"].contents()
        if architecture == JAIS.name:
            return load_jais(folder / self.file)
        if architecture == MPT.name:  # which transformers does not read from this format
            return TransformersModel(load_mpt(folder / self.file))
        with redirect_stderr(StringIO()):  # transformers shows this format's tensors in a bar that has no switch
            return TransformersModel(load_exported(folder, gguf_file=self.file))

    def _stored(self, weight: Tensor) -> np.ndarray[Any, Any]:
        array = np.ascontiguousarray(weight.cpu().numpy())
        return array if array.ndim == 1 else quantize(array, self._type)


def read_gguf_tokenizer(file: Path) -> SentencePieceTokenizer:
    """Return the tokenizer that the fields of a GGUF file describe."""
    fields = gguf.GGUFReader(file).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    proto = write_proto(
        zip(field("tokens"), field("scores"), field("token_type"), strict=True),
        unknown_id=field("unknown_token_id"),
        adds_prefix=field("add_space_prefix"),
        removes_spaces=field("remove_extra_whitespaces"),
    )
    special_ids = {"eos_token": field("eos_token_id")}
    return SentencePieceTokenizer(proto, path=file, special_ids=special_ids, newlines_merge=True)


def _check_vocabulary(vocabulary: Vocabulary, *, tokenizer: Path, rows: int) -> None:
    require_rows(len(vocabulary), tokenizer=tokenizer, rows=rows)
    taken = [p.text for p in vocabulary.pieces if p.type is PieceType.USER_DEFINED and p.text in _TAKEN]
    if taken:
        raise InputError(
            f"tokenizer {tokenizer} has the user-defined symbol {taken[0]!r}, which llama.cpp takes for a control "
            "token and drops from text: export to hf, or train with another name for it"
        )


def _tensors(model: Model, *, vocab_size: int) -> list[tuple[str, Parameter]]:
    """Return the tensors of a file by name; a tied head's weight is there twice where llama.cpp wants one."""
    tensors = [(str(each.gguf), each) for each in describe(model, vocab_size=vocab_size)]
    if model.family == JAIS.name and model.tie_embeddings:
        tensors.append(("output.weight", tensors[0][1]))
    return tensors


def _add_shape(writer: gguf.GGUFWriter, model: Model, *, vocab_size: int) -> None:
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.heads)
    family: Family = FAMILIES[model.family].load()
    writer.add_layer_norm_eps(family.norm_epsilon)
    writer.add_vocab_size(vocab_size)
    if family is not BLOOM:  # without it llama.cpp computes no bias for MPT; its bloom has 8
        writer.add_max_alibi_bias(float(model.alibi_bias_max))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, *, rows: int) -> None:
    """Add the pieces, and names for rows of the embedding that no piece has."""
    unused = [(f"[unused {number}]", 0.0, PieceType.UNUSED) for number in range(len(vocabulary), rows)]
    pieces = [*((p.text, p.score, p.type) for p in vocabulary.pieces), *unused]
    writer.add_tokenizer_model("llama")  # sentencepiece's BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([int(kind) for _, _, kind in pieces])
    writer.add_unk_token_id(vocabulary.unknown_id)
    if vocabulary.begin_id is not None:
        writer.add_bos_token_id(vocabulary.begin_id)
    if vocabulary.end_id is not None:
        writer.add_eos_token_id(vocabulary.end_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
