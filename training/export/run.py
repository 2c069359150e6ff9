"""`trainshort export`: write a checkpoint's model for inference engines, after comparing it with the trained model."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from configs.errors import InputError, MachineError
from configs.paths import config_file
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.tokenizer import Tokenizer
from parallel.compilers import check_cache_folder
from parallel.start import environment
from training.checkpoint.manifest import model_sha256
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.text import held_out_text
from training.evaluation.usable import find_held_out_report
from training.export.facts import ModelFacts
from training.export.folder import new_folder, require_space, try_new_folder
from training.export.formats.table import ExportFormat, LengthLimit, load_format
from training.export.parity import (
    COMPARED_MULTIPLE,
    LogitParity,
    Rounding,
    compare_logits,
    compare_tokenizers,
    measure_rounding,
)
from training.families.table import parameter_count
from training.folder import record_certificate
from training.model.single import SingleModel, load_single
from training.tracking.tracker import attach

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """An exported folder, and how it compared with the trained model.

    Attributes:
        folder: The exported folder.
        facts: What its model card says of the model.
        logits: The difference between its logits and those of the trained model with its weights rounded likewise.
        rounding: What rounding the weights changed at the training length; None if nothing.
        wanted_length: The longest length to compare.
        limit: The longest length that the format's reader can run; `logits.lengths` stops there.
        texts: Texts whose token ids were found equal.
        held_out: Whether the logits are of held-out text; otherwise of random tokens.
    """

    folder: Path
    facts: ModelFacts
    logits: LogitParity
    rounding: Rounding | None
    wanted_length: int
    limit: LengthLimit
    texts: int
    held_out: bool

    @property
    def comparison(self) -> str:
        """How the exported model compared with the trained one, in words."""
        lengths = " and ".join(map(str, self.logits.lengths))
        limited = self.logits.lengths[-1] < self.wanted_length
        shortened = f" (not {self.wanted_length}: {self.limit.reason})" if limited else ""
        return (
            f"at lengths {lengths}{shortened} logits differ by {self.logits.difference:.2g} at most "
            f"(largest {self.logits.scale:.3g}, allowed {self.logits.tolerance:.2g}) on "
            f"{'held-out text' if self.held_out else 'random tokens'}; {self.texts} texts have equal token ids"
            f"{'' if self.rounding is None else f'; {self.rounding}'}"
        )

    def __str__(self) -> str:
        return f"{self.folder}: {self.comparison}"


def export_checkpoint(checkpoint: Path, *, format: str, out: Path, dtype: str | None = None) -> ExportResult:
    """Write a checkpoint's model for inference engines. The folder appears only once it is whole and compared.

    The folder also holds the certificate of the exported model's positions, certificate.json.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        format: A name in `training.export.formats.table.FORMATS`.
        out: A folder that does not exist or is empty; a link to one and a mount point will do.
        dtype: Type of the weights; None for the format's default.
    Raises:
        InputError: the checkpoint cannot be opened, the format cannot hold its model, `out` has files or cannot be
            written, or torch cannot use its cache folder: before the model is loaded. Or a weight is out of the
            type's range.
        MachineError: the disk is too small or failing.
        TrainshortError: the exported model differs from the trained one; the folder is deleted.
    """
    # Refuse what is cheap to check before the checkpoint's files are hashed and the model is loaded.
    check_cache_folder(environment())  # transformers makes it
    exporter = load_format(format, dtype=dtype)
    try_new_folder(out)
    opened = open_checkpoint(checkpoint)
    exporter.check(opened.config.model)
    facts = _facts(opened)
    # weights, by far the most of it
    require_space(out, needed_bytes=int(exporter.bytes_per_weight * facts.parameters))
    model = load_single(opened)
    with new_folder(out) as folder:
        with _report_write_errors(out):
            exporter.write(
                folder,
                name=opened.config.run.name,
                weights=opened.weights(),
                model=opened.config.model,
                vocab_size=opened.vocab_size,
                tokenizer=opened.tokenizer,
                sequence_length=facts.train_length,
                longest=facts.longest,
            )
            text = json.dumps(model.certificate, indent=1)
            (folder / "certificate.json").write_text(f"{text}\n", encoding="utf-8")
        # Compare before the folder takes its name: a wrong export must not be left where an engine would load it.
        result = _compare(opened, model, exporter, folder, out=out, facts=facts)
        with _report_write_errors(out):
            exporter.write_card(folder, facts, comparison=result.comparison)
    _record(opened, model.certificate, file=out / "certificate.json")
    return result


@contextmanager
def _report_write_errors(out: Path) -> Iterator[None]:
    """Turn a failed write into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"export folder {out} cannot be written ({' '.join(str(error).split())}): nothing was exported; free space "
            "or choose another --out"
        ) from None


def _record(checkpoint: Checkpoint, certificate: dict[str, Any], *, file: Path) -> None:
    """Add the certificate to the run folder and its MLflow run, if the checkpoint is still in its run folder."""
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


def _facts(checkpoint: Checkpoint) -> ModelFacts:
    manifest = checkpoint.manifest
    return ModelFacts(
        config=checkpoint.config,
        step=manifest.step,
        samples=manifest.consumed_samples,
        vocab_size=manifest.vocab_size,
        parameters=parameter_count(checkpoint.config.model, vocab_size=manifest.vocab_size),
        report=find_held_out_report(checkpoint.path, step=manifest.step, sha256=model_sha256(manifest)),
    )


def _compare(
    checkpoint: Checkpoint, model: SingleModel, exporter: ExportFormat, folder: Path, *, out: Path, facts: ModelFacts
) -> ExportResult:
    length = facts.train_length
    wanted = (length, COMPARED_MULTIPLE * length)
    limit = exporter.length_limit(checkpoint.config.model)
    # Without duplicates: both lengths may be over the limit.
    lengths = tuple(dict.fromkeys(min(length, limit.tokens) for length in wanted))
    held_out = _held_out_tokens(checkpoint, count=lengths[-1])
    tokens = _random_tokens(checkpoint, count=lengths[-1]) if held_out is None else held_out
    tokenizer = Tokenizer.load(checkpoint.tokenizer)
    texts = EDGE_CASE_TEXTS if held_out is None else (*EDGE_CASE_TEXTS, tokenizer.decode(held_out.tolist()))
    compared = compare_tokenizers(tokenizer, exported=exporter.read_tokenizer(folder), texts=texts)
    first = tokens[None, : lengths[0]]
    before = model.logits(first)
    model.change_weights(exporter.rounded)
    rounding = measure_rounding(before, model.logits(first))
    parity = compare_logits(model.logits, exported=exporter.read_logits(folder), tokens=tokens, lengths=lengths)
    return ExportResult(
        folder=out,
        facts=facts,
        logits=parity,
        rounding=rounding,
        wanted_length=wanted[-1],
        limit=limit,
        texts=compared,
        held_out=held_out is not None,
    )


def _held_out_tokens(checkpoint: Checkpoint, *, count: int) -> torch.Tensor | None:
    """Return the first held-out tokens, [count] int64, or None if there are fewer or the data is missing."""
    try:
        tokens = held_out_text(checkpoint).tokens[:count]
    except InputError:
        # The data may be on another machine. Random tokens compare the logits just as well.
        return None
    return torch.from_numpy(tokens.copy()) if len(tokens) == count else None


def _random_tokens(checkpoint: Checkpoint, *, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(checkpoint.vocab_size, size=count))
