"""`trainshort export`: a checkpoint as inference engines read it, compared before it takes its name."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import InputError
from configs.paths import config_file
from data_pipeline.tokenizer import Tokenizer
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.text import held_out_text
from training.export.folder import new_folder, require_new
from training.export.formats.huggingface import LONGEST_COMPARED, fill_folder, require_bloom
from training.export.parity import (
    TRICKY,
    LogitParity,
    comparable_length,
    compare_logits,
    compare_tokenizers,
)
from training.folder import record_certificate
from training.model.single import SingleModel, load_single
from training.tracking.tracker import attach

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was exported, and how it was compared.

    Attributes:
        folder: The exported folder.
        logits: How far its logits are from the trained model's.
        asked_length: The longest length to compare; the logits' lengths are shorter where transformers' attention
            would take too much memory.
        texts: Texts whose token ids were found equal.
        real_text: Whether the logits are those of held-out text; of random tokens otherwise.
    """

    folder: Path
    logits: LogitParity
    asked_length: int
    texts: int
    real_text: bool

    def __str__(self) -> str:
        lengths = " and ".join(map(str, self.logits.lengths))
        shortened = (
            f" (not {self.asked_length}: transformers' attention scores would take over 2 GB)"
            if self.logits.lengths[-1] < self.asked_length
            else ""
        )
        return (
            f"{self.folder}: at lengths {lengths}{shortened} logits differ by {self.logits.difference:.2g} at most "
            f"(largest {self.logits.scale:.3g}, allowed {self.logits.tolerance:.2g}) on "
            f"{'held-out text' if self.real_text else 'random tokens'}; {self.texts} texts have equal token ids"
        )


def export_checkpoint(checkpoint: Path, *, format: str, out: Path) -> Exported:
    """Write a checkpoint's model for inference engines, whole and compared or not at all.

    The folder also holds the certificate of the positions that were exported, certificate.json.

    Args:
        checkpoint: A step folder, or a run folder for its newest.
        format: `hf`, a folder of transformers' BloomForCausalLM.
        out: A folder that does not exist or is empty.
    Raises:
        InputError: the checkpoint cannot be opened, the format cannot hold its model, or `out` has files.
        TrainshortError: what was written differs from the trained model; it is deleted.
    """
    if format == "gguf":
        raise InputError("format gguf is not available in this version: use hf")
    if format != "hf":
        raise InputError(f"format {format!r} is not known: use hf")
    require_new(out)
    opened = open_checkpoint(checkpoint)
    require_bloom(opened.config.model)
    model = load_single(opened)
    with new_folder(out) as folder:
        fill_folder(
            folder,
            weights=opened.weights(),
            model=opened.config.model,
            vocab_size=opened.vocab_size,
            tokenizer=opened.tokenizer,
            sequence_length=opened.config.data.sequence_length,
        )
        text = json.dumps(model.certificate, indent=1)
        (folder / "certificate.json").write_text(f"{text}\n", encoding="utf-8")
        exported = _compare(opened, model, folder, out=out)
    _record(opened, model.certificate, file=out / "certificate.json")
    return exported


def _record(checkpoint: Checkpoint, certificate: dict[str, Any], *, file: Path) -> None:
    """Add the certificate to the run's own and to its MLflow run, where the checkpoint still lies in its run folder."""
    run_dir = checkpoint.run_dir
    if not config_file(run_dir).is_file():
        return
    try:
        record_certificate(certificate, run_dir=run_dir, step=checkpoint.step)
    except OSError as error:
        logger.warning("the certificate is not added to %s (%s): it is in %s", run_dir, error.strerror, file)
    tracker = attach(run_dir, uri=checkpoint.config.track.uri)
    if tracker is not None:
        tracker.artifact(file, folder="export")
        tracker.close()


def _compare(checkpoint: Checkpoint, model: SingleModel, folder: Path, *, out: Path) -> Exported:
    length = checkpoint.config.data.sequence_length
    wanted = (length, LONGEST_COMPARED * length)
    lengths = tuple(dict.fromkeys(comparable_length(n, heads=checkpoint.config.model.heads) for n in wanted))
    held_out = _held_out_tokens(checkpoint, count=lengths[-1])
    tokens = _random_tokens(checkpoint, count=lengths[-1]) if held_out is None else held_out
    tokenizer = Tokenizer.load(checkpoint.tokenizer)
    texts = TRICKY if held_out is None else (*TRICKY, tokenizer.decode(held_out.tolist()))
    compared = compare_tokenizers(folder, tokenizer=tokenizer, texts=texts)
    parity = compare_logits(folder, logits=model.logits, tokens=tokens, lengths=lengths)
    return Exported(folder=out, logits=parity, asked_length=wanted[-1], texts=compared, real_text=held_out is not None)


def _held_out_tokens(checkpoint: Checkpoint, *, count: int) -> torch.Tensor | None:
    """Return the first held-out tokens, [count], or None where there are not as many."""
    try:
        tokens = held_out_text(checkpoint).tokens[:count]
    except InputError:
        # the data may have stayed on another machine; random tokens compare as well
        return None
    return torch.from_numpy(tokens.copy()) if len(tokens) == count else None


def _random_tokens(checkpoint: Checkpoint, *, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(checkpoint.vocab_size, size=count))
