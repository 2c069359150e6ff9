"""The export formats: their names, and what each one implements. A new format is one file and one row of the table.

The command line and the SLURM scripts read the names, so nothing here imports torch or a format's libraries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from configs.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from configs.schema import Model
    from training.export.facts import ModelFacts

# Planned formats, refused with their own message.
_PLANNED = ("gguf",)


class TextTokenizer(Protocol):
    """A tokenizer that can be compared with another."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
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
    """Write a trained model for an inference engine, and read it back to compare it."""

    def check(self, model: "Model") -> None:
        """Refuse a model that the format cannot hold.

        Raises:
            InputError: names each key of the run file, its value, and what the format holds.
        """
        ...

    def write(
        self,
        folder: Path,
        *,
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
            weights: Whole tensors, fp32, by logical name.
            model: The decoder's shape.
            vocab_size: Rows of the word embedding, without padding.
            tokenizer: A sentencepiece .model file.
            sequence_length: Tokens that the model was trained at.
            longest: Tokens of the longest text that an engine should take.
        """
        ...

    def write_card(self, folder: Path, facts: "ModelFacts", *, comparison: str) -> None:
        """Write what a reader of the folder should know of the model.

        Args:
            folder: The written folder.
            facts: How the model was trained, and what was measured of it.
            comparison: How the exported model compared with the trained one.
        """
        ...

    def length_limit(self, model: "Model") -> LengthLimit:
        """Return the longest sequence for which `read_logits` stays within memory."""
        ...

    def read_tokenizer(self, folder: Path) -> TextTokenizer:
        """Return the tokenizer of a written folder, as the format's engine loads it."""
        ...

    def read_logits(self, folder: Path) -> "Callable[[Tensor], Tensor]":
        """Return the model of a written folder, as the format's engine loads it.

        Returns:
            A function from tokens, [1, seq] int64, to logits, [1, seq, vocab] fp32.
        Raises:
            TrainshortError: weights are missing, or the engine does not know some.
        """
        ...


def _huggingface() -> ExportFormat:
    from training.export.formats.huggingface import HuggingFaceFormat

    return HuggingFaceFormat()


def _bloom_problem(model: "Model") -> str | None:
    from training.export.formats.bloom_limits import bloom_problem

    return bloom_problem(model)


# name: (description for the help text, why it cannot hold a model, function that imports the implementation)
_TABLE: dict[str, tuple[str, "Callable[[Model], str | None]", Callable[[], ExportFormat]]] = {
    "hf": ("transformers' BloomForCausalLM", _bloom_problem, _huggingface),
}
FORMATS = {name: description for name, (description, _, _) in _TABLE.items()}
# the format that a SLURM chain exports to
CHAIN_FORMAT = "hf"


def export_problems(model: "Model") -> dict[str, str]:
    """Return why each format that cannot hold a model cannot, by the name of the format."""
    answers = {name: problem_of(model) for name, (_, problem_of, _) in _TABLE.items()}
    return {name: problem for name, problem in answers.items() if problem is not None}


def load_format(name: str) -> ExportFormat:
    """Import and return the format of this name.

    Raises:
        InputError: the format is unknown or not available yet.
    """
    require_format(name)
    _, _, load = _TABLE[name]
    return load()


def require_format(name: str) -> None:
    """Refuse the name of a format that cannot be written; imports nothing.

    Raises:
        InputError: the format is unknown or not available yet.
    """
    if name in _TABLE:
        return
    available = " or ".join(FORMATS)
    if name in _PLANNED:
        raise InputError(f"format {name} is not available in this version: use {available}")
    raise InputError(f"format {name!r} is not known: use {available}")
