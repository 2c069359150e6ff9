"""Read the pieces of a sentencepiece model file, so that exports can write them in other formats, and back."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

from configs.errors import InputError

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class PieceType(IntEnum):
    """Kind of a piece, numbered as in the sentencepiece format, which GGUF shares."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One token: its text (a space is U+2581), its merge score (the highest merges first) and its type."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a model and the ids of its special tokens; None if the model has no such token."""

    pieces: tuple[Piece, ...]
    """In the order of their token ids."""
    unknown_id: int
    begin_id: int | None
    end_id: int | None
    pad_id: int | None

    def __len__(self) -> int:
        return len(self.pieces)


def read_vocabulary(model: Path) -> Vocabulary:
    """Read a sentencepiece model; refuse one that other runtimes would encode differently.

    A portable model is BPE and keeps text as it is: identity normalization, no prefix space, no space removed, bytes
    for characters without a piece. Unigram models are not portable: implementations round and break ties differently.

    Args:
        model: A sentencepiece .model file.
    Raises:
        InputError: the file cannot be read, is not a sentencepiece model, or is not portable.
    """
    proto = _parse(model)
    _require_portable(proto, model)
    trainer = proto.trainer_spec
    return Vocabulary(
        pieces=tuple(Piece(piece.piece, piece.score, PieceType(piece.type)) for piece in proto.pieces),
        unknown_id=trainer.unk_id,
        begin_id=trainer.bos_id if trainer.bos_id >= 0 else None,
        end_id=trainer.eos_id if trainer.eos_id >= 0 else None,
        pad_id=trainer.pad_id if trainer.pad_id >= 0 else None,
    )


def write_proto(
    pieces: Iterable[tuple[str, float, int]], *, unknown_id: int, adds_prefix: bool, removes_spaces: bool
) -> bytes:
    """Return a sentencepiece BPE model of pieces that another format held.

    Args:
        pieces: Text, score and `PieceType` of each, in the order of their ids.
        unknown_id: Id of the unknown piece.
        adds_prefix: Whether a space is added before a text.
        removes_spaces: Whether spaces at its ends, and of several all but one, are removed.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for text, score, kind in pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback, proto.trainer_spec.unk_id = 2, True, unknown_id
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = adds_prefix
    proto.normalizer_spec.remove_extra_whitespaces = removes_spaces
    model: bytes = proto.SerializeToString()
    return model


def _parse(model: Path) -> Any:
    # protobuf creates the class when the module is imported: a type checker does not see it
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model.read_bytes())
    except OSError as error:
        raise InputError(f"tokenizer {model} cannot be read ({error.strerror}): check the path") from None
    except DecodeError:
        raise InputError(
            f"tokenizer {model} is not a sentencepiece model: give a .model file or a tokenizer.json"
        ) from None
    if not proto.pieces:
        raise InputError(f"tokenizer {model} has no pieces: give a sentencepiece .model file")
    return proto


def _require_portable(proto: Any, model: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    wrong = []
    if trainer.model_type != 2:
        wrong.append(f"model type {_MODEL_TYPES.get(trainer.model_type, trainer.model_type)} (must be bpe)")
    if normalizer.name != "identity" or normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        wrong.append(f"normalization {normalizer.name or 'unnamed'} (must be identity)")
    if normalizer.add_dummy_prefix:
        wrong.append("add_dummy_prefix (must be off)")
    if normalizer.remove_extra_whitespaces:
        wrong.append("remove_extra_whitespaces (must be off)")
    if not normalizer.escape_whitespaces:
        wrong.append("no escape_whitespaces (must be on)")
    if not trainer.byte_fallback:
        wrong.append("no byte_fallback (must be on)")
    if trainer.treat_whitespace_as_suffix:
        wrong.append("treat_whitespace_as_suffix (must be off)")
    if wrong:
        raise InputError(
            f"tokenizer {model} would encode differently in other runtimes: it has {', '.join(wrong)}; "
            "use another, or remove data.tokenizer to have one trained"
        )
