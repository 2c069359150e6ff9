"""`trainshort export`: write a checkpoint's model for inference engines, after comparing it with the trained model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.files import in_use
from configs.paths import config_file
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.tokenizer import load_tokenizer
from parallel.compilers import check_cache_folder
from parallel.start import environment
from training.averaging.record import averaged_steps
from training.checkpoint.manifest import model_sha256
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.usable import find_held_out_report
from training.export.card import CARD_JSON, Origin, write_export_card
from training.export.facts import ModelFacts
from training.export.folder import new_folder, report_failed_writes, require_space, try_new_folder
from training.export.formats.model_card import model_card
from training.export.formats.servers import InferenceServer
from training.export.formats.table import ExportFormat, LengthLimit, load_format, require_registrable, server_of
from training.export.parity import (
    COMPARED_MULTIPLE,
    compare_continuations,
    compare_logits,
    compare_tokenizers,
)
from training.export.result import ExportResult, ServedText
from training.export.serve import check_served
from training.export.trained import TrainedOutputs, compute_trained
from training.families.table import parameter_count
from training.tracking.registry import ModelRegistry, open_registry
from training.tracking.spool import now_ms
from training.tracking.tracker import attached

_CERTIFICATE = "certificate.json"


def export_checkpoint(
    checkpoint: Path,
    *,
    format: str,
    out: Path,
    dtype: str | None = None,
    with_code: bool = False,
    serve_check: bool = False,
    register: str | None = None,
) -> ExportResult:
    """Write a checkpoint's model for inference engines. The folder appears only once it is whole and compared.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        format: A name in `training.export.formats.table.FORMATS`.
        out: A folder that does not exist or is empty; a link to one and a mount point will do.
        dtype: Type of the weights; None for the format's default.
        with_code: Whether the folder carries its own modelling code.
        serve_check: Whether to start a server of the format and compare a completion with the trained model's too.
        register: Name in MLflow's Model Registry to add it to as a new version; None for not at all.
    Raises:
        InputError: the checkpoint cannot be opened or its model held, `out` has files or cannot be written, torch
            cannot use its cache folder, no server is installed, MLflow refuses the name, or a weight is out of range.
        MachineError: the disk is too small or failing, or the server gives no answer; the folder is deleted. Or it
            cannot be registered; the folder stays.
        TrainshortError: the exported model differs from the trained one; the folder is deleted.
    """
    began_ms = now_ms()
    exporter = _early_checks(format, dtype=dtype, with_code=with_code, serve_check=serve_check, out=out)
    opened = open_checkpoint(checkpoint)
    exporter.check(opened.config.model)
    with in_use(opened.path.parent):
        registry = None if register is None else _registry(register, checkpoint=opened, format=format)
        server = server_of(format, with_code=with_code, model=opened.config.model) if serve_check else None
        facts = _facts(opened)
        require_space(out, needed_bytes=int(exporter.bytes_per_weight * facts.parameters))  # by far the most of it
        lengths, limit = _compared_lengths(exporter, opened)
        trained = compute_trained(opened, exporter, lengths=lengths)
        with new_folder(out) as folder:
            with report_failed_writes(out, undone="exported"):
                _write_model(folder, exporter, opened, facts, certificate=trained.certificate)
            # Compare before the folder takes its name: a wrong export must not be left where an engine would load it.
            result = _compare(opened, trained, exporter, folder, out=out, facts=facts, limit=limit)
            if server is not None:
                result = replace(result, served=_serve(opened, trained, server, exporter, folder))
            with report_failed_writes(out, undone="exported"):
                _write_cards(folder, result, exporter, checkpoint=opened, format=format)
        _record(opened, result, format=format, dtype=exporter.dtype, began_ms=began_ms)
        return replace(result, registered=registry.register(out)) if registry else result


def _early_checks(format: str, *, dtype: str | None, with_code: bool, serve_check: bool, out: Path) -> ExportFormat:
    """Refuse what is cheap to check before the checkpoint's files are hashed and the model is loaded."""
    check_cache_folder(environment())  # transformers makes it
    exporter = load_format(format, dtype=dtype, with_code=with_code)
    if serve_check:
        server_of(format, with_code=with_code)
    try_new_folder(out)
    return exporter


def _registry(name: str, *, checkpoint: Checkpoint, format: str) -> ModelRegistry:
    require_registrable(format)
    return open_registry(name, run_dir=checkpoint.run_dir, track=checkpoint.config.track)


def _write_model(
    folder: Path, exporter: ExportFormat, checkpoint: Checkpoint, facts: ModelFacts, *, certificate: dict[str, Any]
) -> None:
    exporter.write(
        folder,
        name=checkpoint.config.run.name,
        weights=checkpoint.weights(),
        model=checkpoint.config.model,
        vocab_size=checkpoint.vocab_size,
        tokenizer=checkpoint.tokenizer,
        sequence_length=facts.train_length,
        longest=facts.longest,
    )
    text = json.dumps(certificate, indent=1)
    (folder / _CERTIFICATE).write_text(f"{text}\n", encoding="utf-8")


def _write_cards(
    folder: Path, result: ExportResult, exporter: ExportFormat, *, checkpoint: Checkpoint, format: str
) -> None:
    """Write README.md for the Hub, and the card of the export, which hashes all other files."""
    reader = exporter.reader(checkpoint.config.model)
    readme = model_card(
        result.facts, comparison=result.comparison, engine=reader, dtype=exporter.dtype, file=exporter.file
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    origin = Origin(
        run=checkpoint.config.run.name,
        step=checkpoint.manifest.step,
        model_sha256=model_sha256(checkpoint.manifest),
        tokenizer_sha256=checkpoint.manifest.tokenizer_sha256,
    )
    write_export_card(
        folder,
        result,
        format=format,
        dtype=exporter.dtype,
        file=exporter.file,
        reader=reader,
        origin=origin,
    )


def _serve(
    checkpoint: Checkpoint, trained: TrainedOutputs, server: InferenceServer, exporter: ExportFormat, folder: Path
) -> ServedText:
    largest = max(logits.abs().max().item() for logits in trained.logits)
    return check_served(
        server,
        folder / exporter.file,
        expected=trained.continuation,
        tokenizer=load_tokenizer(checkpoint.tokenizer),
        tolerance=server.tolerances[exporter.dtype] * max(1.0, largest),
    )


def _record(checkpoint: Checkpoint, result: ExportResult, *, format: str, dtype: str, began_ms: int) -> None:
    """Add the certificate and the card to the MLflow run of the run folder, if the checkpoint is still in it."""
    run_dir, config, out = checkpoint.run_dir, checkpoint.config, result.folder
    if not config_file(run_dir).is_file():
        return
    with attached(run_dir, uri=config.track.uri, offline=config.track.offline) as tracker:
        if tracker is None:
            return
        for name in (_CERTIFICATE, CARD_JSON):
            tracker.artifact(out / name, folder="export")
        tracker.nested(
            f"export {checkpoint.path.resolve().name}, {format}",
            kind="export",
            params={"checkpoint": checkpoint.path.resolve().name, "format": format, "dtype": dtype, "folder": str(out)},
            points=[("export/logit_difference", result.logits.difference, checkpoint.step)],
            began_ms=began_ms,
        )


def _facts(checkpoint: Checkpoint) -> ModelFacts:
    manifest = checkpoint.manifest
    return ModelFacts(
        config=checkpoint.config,
        step=manifest.step,
        samples=manifest.consumed_samples,
        vocab_size=manifest.vocab_size,
        parameters=parameter_count(checkpoint.config.model, vocab_size=manifest.vocab_size),
        train_length=checkpoint.train_length,
        report=find_held_out_report(checkpoint.path, step=manifest.step, sha256=model_sha256(manifest)),
        averaged=averaged_steps(checkpoint.run_dir),
    )


def _compared_lengths(exporter: ExportFormat, checkpoint: Checkpoint) -> tuple[tuple[int, ...], LengthLimit]:
    """Return the lengths to compare, and the limit that may have shortened them."""
    length, limit = checkpoint.config.data.sequence_length, exporter.length_limit(checkpoint.config.model)
    wanted = (length, COMPARED_MULTIPLE * length)
    # Without duplicates: both lengths may be over the limit.
    return tuple(dict.fromkeys(min(length, limit.tokens) for length in wanted)), limit


def _compare(
    checkpoint: Checkpoint,
    trained: TrainedOutputs,
    exporter: ExportFormat,
    folder: Path,
    *,
    out: Path,
    facts: ModelFacts,
    limit: LengthLimit,
) -> ExportResult:
    tokenizer, continuation = load_tokenizer(checkpoint.tokenizer), trained.continuation
    texts = EDGE_CASE_TEXTS if trained.text is None else (*EDGE_CASE_TEXTS, trained.text)
    compared = compare_tokenizers(tokenizer, exported=exporter.read_tokenizer(folder), texts=texts)
    exported = exporter.read_logits(folder)
    parity = compare_logits(trained.logits, exported=exported, tokens=trained.tokens)
    continued = exported.continue_greedily(
        continuation.prompt_ids, tokens=len(continuation.ids), end=tokenizer.end_of_document
    )
    return ExportResult(
        folder=out,
        facts=facts,
        logits=parity,
        rounding=trained.rounding,
        wanted_length=COMPARED_MULTIPLE * facts.train_length,
        limit=limit,
        texts=compared,
        continued=compare_continuations(continuation, continued, tolerance=parity.tolerance),
        served=None,
        held_out=trained.text is not None,
    )
