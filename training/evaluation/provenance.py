"""What an evaluation was made from, and when. Imports no torch."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.text import identify_documents, identify_text
from training.checkpoint.manifest import model_sha256
from training.versions import installed_version, source_code

if TYPE_CHECKING:
    from training.checkpoint.read import Checkpoint


@dataclass(frozen=True)
class Provenance:
    """What an evaluation was made from, and when.

    Attributes:
        date: When it began, in UTC, as ISO 8601 with seconds.
        command: The command line, quoted for a shell; None if no command made it.
        versions: Versions of trainshort, torch and what else decides the result, and the code's commit; None where
            unknown.
        weights_sha256: Hash of the checkpoint's weights, configuration and tokenizer.
        tokenizer_sha256: Hash of its tokenizer.
        text_sha256: Hash of the text, whatever the tokenizer.
        documents_sha256: Hash of the text with where its documents begin, if attention stays inside them; None if it
            sees all of the text.
        text_path: The text's file; None for the held-out text.
        text_bytes: Length of the text in UTF-8.
    """

    date: str
    command: str | None
    versions: dict[str, str | None]
    weights_sha256: str
    tokenizer_sha256: str
    text_sha256: str
    documents_sha256: str | None
    text_path: str | None
    text_bytes: int


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that an evaluation ran.

    Attributes:
        path: Its checkpoint, or its folder.
        step: Optimizer steps taken; 0 if it was trained elsewhere.
        train_length: Tokens of a training sequence.
        position: Its position method.
        attention: What computed its attention in the evaluation: training may have used another.
        precision: What the evaluation computed in.
    """

    path: Path
    step: int
    train_length: int
    position: str
    attention: str
    precision: str


def evaluated_model(checkpoint: "Checkpoint", certificate: dict[str, Any]) -> EvaluatedModel:
    """Return a checkpoint's model as it was evaluated.

    Args:
        checkpoint: The checkpoint.
        certificate: Certificate of the model that was evaluated.
    """
    rank = certificate["ranks"][0]
    backends = dict.fromkeys(each["backend"] for each in certificate["ranks"])  # `auto` may refuse one on some ranks
    return EvaluatedModel(
        path=checkpoint.path.absolute(),
        step=checkpoint.step,
        train_length=checkpoint.train_length,
        position=rank["position"],
        attention=", ".join(backends),
        precision=rank["precision"],
    )


def provenance_of(
    checkpoint: "Checkpoint",
    tokens: NDArray[np.integer],
    *,
    data: Path | None,
    command: str | None,
    begins: NDArray[np.bool_] | None = None,
    weights_sha256: str | None = None,
    versions: dict[str, str | None] | None = None,
) -> Provenance:
    """Return what an evaluation that begins now is made from.

    Args:
        checkpoint: The checkpoint.
        tokens: The text, [tokens].
        data: The text's file; None for the held-out text.
        command: The command line, quoted for a shell.
        begins: Whether each token begins a document that attention stays inside of, [tokens]; None if it sees all.
        weights_sha256: Hash of weights, configuration and tokenizer; None for the checkpoint's.
        versions: Versions that decide the result; None for those of a checkpoint.
    """
    text = identify_text(tokens, checkpoint.tokenizer)
    return Provenance(
        date=evaluation_date(),
        command=command,
        versions=versions or product_versions(),
        weights_sha256=weights_sha256 or model_sha256(checkpoint.manifest),
        tokenizer_sha256=checkpoint.manifest.tokenizer_sha256,
        text_sha256=text.sha256,
        documents_sha256=identify_documents(text, tokens, checkpoint.tokenizer, begins=begins),
        text_path=None if data is None else str(data.resolve()),
        text_bytes=text.bytes,
    )


def evaluation_date() -> str:
    """Return the date of an evaluation that begins now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def product_versions(*more: str) -> dict[str, str | None]:
    """Return the versions of trainshort, torch, further packages and the code's commit; None where unknown."""
    source = source_code()
    commit = None if source is None else f"{source['commit']}{' with changes' if source['diff'] else ''}"
    return {**{name: installed_version(name) for name in ("trainshort", "torch", *more)}, "commit": commit}
