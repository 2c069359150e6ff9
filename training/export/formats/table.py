"""The export formats: their names, and what each one implements. A new format is one file and one row of the table.

The command line and the SLURM scripts read the names, so nothing here imports torch or a format's libraries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from configs.errors import InputError
from training.export.formats.readers import Reader
from training.export.formats.servers import LLAMA_CPP_SERVERS, VLLM_SERVERS, InferenceServer, require_server

if TYPE_CHECKING:
    from torch import Tensor

    from configs.schema import Model
    from parallel.parameter import Shard


class TextTokenizer(Protocol):
    """A tokenizer that can be compared with another."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
        ...


class ExportedModel(Protocol):
    """A written model, as the format's engine loads it."""

    def __call__(self, tokens: "Tensor", /) -> "Tensor":
        """Return the logits of tokens, [1, seq] int64, as [1, seq, vocab] fp32, which the caller may overwrite."""
        ...

    def continue_greedily(self, ids: Sequence[int], *, tokens: int, end: int) -> list[int]:
        """Return the ids of new tokens, the likeliest each.

        Args:
            ids: Token ids of the text to continue, at least one.
            tokens: New tokens at most.
            end: The end-of-document token, the last one if it comes.
        """
        ...


@dataclass(frozen=True)
class LengthLimit:
    """The longest sequence that a format's reader can run within memory.

    Attributes:
        tokens: Its length in tokens.
        reason: Why not longer, for the report of an export.
    """

    tokens: int
    reason: str


class ExportFormat(Protocol):
    """Write a trained model for an inference engine in one type of weights, and read it back to compare it.

    Attributes:
        dtype: The type of the weights.
        bytes_per_weight: What a weight takes, about.
        file: Name of the file that an engine loads; empty if it loads the folder.
    """

    dtype: str
    bytes_per_weight: float
    file: str

    def reader(self, model: "Model") -> Reader:
        """Return what the cards say of what runs a model."""
        ...

    def check(self, model: "Model") -> None:
        """Refuse a model that the format cannot hold.

        Raises:
            InputError: names each key of the run file, its value, and what the format holds.
        """
        ...

    def rounded(self, weight: "Tensor", shard: "Shard", *, model: "Model") -> "Tensor":
        """Return a weight as the written model has it, in fp32.

        Args:
            weight: The weight, whole.
            shard: Its declaration.
            model: The decoder's shape.
        Raises:
            InputError: it has no such value in this type.
        """
        ...

    def write(
        self,
        folder: Path,
        *,
        name: str,
        weights: "Mapping[str, Tensor]",
        model: "Model",
        vocab_size: int,
        tokenizer: Path,
        sequence_length: int,
        longest: int,
    ) -> None:
        """Write the model and its tokenizer.

        Args:
            folder: An empty folder that exists.
            name: Name of the run.
            weights: Whole tensors, fp32, by logical name.
            model: The decoder's shape.
            vocab_size: Rows of the word embedding, without padding.
            tokenizer: A sentencepiece .model file, or a tokenizer.json.
            sequence_length: Tokens that the model was trained at.
            longest: Tokens of the longest text that an engine should take.
        """
        ...

    def length_limit(self, model: "Model") -> LengthLimit:
        """Return the longest sequence for which `read_logits` stays within memory."""
        ...

    def read_tokenizer(self, folder: Path) -> TextTokenizer:
        """Return the tokenizer of a written folder, as the format's engine loads it."""
        ...

    def read_logits(self, folder: Path) -> ExportedModel:
        """Return the model of a written folder, as the format's engine loads it.

        Raises:
            TrainshortError: weights are missing, or the engine does not know some.
        """
        ...


def _huggingface(dtype: str) -> ExportFormat:
    from training.export.formats.huggingface import HuggingFaceFormat

    return HuggingFaceFormat(dtype)


def _huggingface_with_code(dtype: str) -> ExportFormat:
    from training.export.formats.with_code import WithCodeFormat

    return WithCodeFormat(dtype)


def _gguf(dtype: str) -> ExportFormat:
    from training.export.formats.gguf import GgufFormat

    return GgufFormat(dtype)


def _huggingface_problem(model: "Model") -> str | None:
    from training.export.formats.family_limits import huggingface_problem

    return huggingface_problem(model)


def _gguf_problem(model: "Model") -> str | None:
    from training.export.formats.family_limits import gguf_problem

    return gguf_problem(model)


@dataclass(frozen=True)
class FormatRow:
    """One format.

    Attributes:
        description: For the help text.
        dtypes: Types that its weights can have, the default first.
        problem_of: Returns why it cannot hold a model, None if it can.
        load: Imports the implementation, and returns it for a type of weights.
        servers: What `--serve-check` can start, the first choice first.
        in_mlflow: Whether MLflow can load it, and so register it.
        load_with_code: Likewise of the one that carries its own modelling code; None if there is none.
    """

    description: str
    dtypes: tuple[str, ...]
    problem_of: "Callable[[Model], str | None]"
    load: Callable[[str], ExportFormat]
    servers: tuple[InferenceServer, ...]
    in_mlflow: bool
    load_with_code: Callable[[str], ExportFormat] | None = None


FORMATS = {
    "hf": FormatRow(
        "transformers' Bloom or Mpt",
        ("fp32", "bf16", "fp16"),
        _huggingface_problem,
        _huggingface,
        VLLM_SERVERS,
        in_mlflow=True,
        load_with_code=_huggingface_with_code,
    ),
    "gguf": FormatRow(
        "one file for llama.cpp",
        ("f32", "f16", "q8_0"),
        _gguf_problem,
        _gguf,
        LLAMA_CPP_SERVERS,
        in_mlflow=False,
    ),
}
DTYPES = tuple(dict.fromkeys(dtype for row in FORMATS.values() for dtype in row.dtypes))
# the format that a SLURM chain exports to
CHAIN_FORMAT = "hf"


def export_problems(model: "Model") -> dict[str, str]:
    """Return why each format that cannot hold a model cannot, by the name of the format."""
    answers = {name: row.problem_of(model) for name, row in FORMATS.items()}
    return {name: problem for name, problem in answers.items() if problem is not None}


def chain_export_options(model: "Model") -> list[str]:
    """Return the options of `export` in a SLURM chain: what transformers' classes cannot hold carries its code."""
    return ["--format", CHAIN_FORMAT, *(["--with-code"] if CHAIN_FORMAT in export_problems(model) else [])]


def load_format(name: str, *, dtype: str | None = None, with_code: bool = False) -> ExportFormat:
    """Import and return the format of this name, for a type of weights or its default.

    Raises:
        InputError: the format is unknown, has no such type, or cannot carry code.
    """
    dtype = require_format(name, dtype=dtype, with_code=with_code)
    row = FORMATS[name]
    load = row.load_with_code if with_code and row.load_with_code else row.load
    return load(dtype)


def require_format(name: str, *, dtype: str | None = None, with_code: bool = False) -> str:
    """Return the type of weights of an export, a format's default if none is given; imports nothing.

    Raises:
        InputError: the format is unknown, has no such type, or cannot carry code.
    """
    if name not in FORMATS:
        raise InputError(f"format {name!r} is not known: use {' or '.join(FORMATS)}")
    dtypes = FORMATS[name].dtypes
    if dtype is not None and dtype not in dtypes:
        raise InputError(f"format {name} has no weights in {dtype!r}: use {' or '.join(dtypes)}")
    if with_code and FORMATS[name].load_with_code is None:
        carrying = " or ".join(name for name, row in FORMATS.items() if row.load_with_code)
        raise InputError(f"format {name} cannot carry code: drop --with-code, or use --format {carrying}")
    return dtype or dtypes[0]


def require_registrable(name: str) -> None:
    """Refuse to register a format that MLflow cannot load.

    Raises:
        InputError: says which ones it can.
    """
    if not FORMATS[name].in_mlflow:
        loaded = " or ".join(name for name, row in FORMATS.items() if row.in_mlflow)
        raise InputError(f"MLflow cannot load {name}: drop --register, or use --format {loaded}")


def server_of(name: str, *, with_code: bool, model: "Model | None" = None) -> InferenceServer:
    """Return the server that `--serve-check` starts for an export.

    Args:
        name: The format.
        with_code: Whether it carries its own code.
        model: The model; None if it is not known yet.
    Raises:
        InputError: no server can run it, or none that can is installed.
    """
    if with_code:
        raise InputError("no server runs a folder with its own code: drop --serve-check or --with-code")
    if not FORMATS[name].servers:
        raise InputError(f"no server runs format {name}: drop --serve-check")
    servers = [server for server in FORMATS[name].servers if model is None or server.runs(model)]
    if model is not None and not servers:
        untied = "" if model.tie_embeddings else " with model.tie_embeddings false"
        raise InputError(
            f"no server of format {name} runs the family {model.family}{untied}: drop --serve-check, or export to gguf"
        )
    return require_server(servers)
