"""The card of an export: EXPORT.md to read, export.json for programs. Imports no torch.

It says what the folder holds (hashes), what the model is (architecture, slopes), what must be computed in fp32, how far
it can be used, what was verified and with which versions, and how to serve it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.positions import POSITIONS
from configs.schema import Model
from training.checkpoint.disk import FileEntry, describe_file
from training.evaluation.usable import whole_windows
from training.export.facts import ModelFacts, facts_of_context
from training.export.formats.readers import Reader, ServingCommand
from training.export.result import ExportResult, ServedText
from training.versions import installed_version

FORMAT_VERSION = 1
CARD, CARD_JSON = "EXPORT.md", "export.json"
_FP32 = "Positions and the softmax of attention are computed in fp32, whatever the type of weights and activations."
_TENSOR_PARALLEL = (
    "A slope belongs to a head's number among all heads of the model. A tensor-parallel rank takes the slopes of the "
    "heads that it holds, not those of a model with as many heads. Engines that derive slopes from the local number of "
    "heads (TransformerEngine, cuDNN, FlashInfer) are wrong under tensor parallelism: give them the rank's slopes, or "
    "serve on one device."
)


@dataclass(frozen=True)
class Origin:
    """Where the weights come from.

    Attributes:
        run: Name of the run.
        step: Optimizer steps taken.
        model_sha256: Hash of the files that the checkpoint's model is built from.
        tokenizer_sha256: Hash that identifies the checkpoint's tokenizer.
    """

    run: str
    step: int
    model_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class Architecture:
    """What the model is.

    Attributes:
        model: The section `model` of its run file.
        vocab_size: Rows of the embedding.
        parameters: Number of parameters; a tied one counts once.
        slopes: ALiBi's slope of each head of the model, fp64; None for other positions.
    """

    model: Mapping[str, Any]
    vocab_size: int
    parameters: int
    slopes: tuple[float, ...] | None


@dataclass(frozen=True)
class PrecisionContract:
    """What must be computed in which type.

    Attributes:
        weights: Type of the weights here.
        contract: What every runtime must do.
        runtimes: What each runtime does, by its name.
        tensor_parallel: Which slopes a tensor-parallel rank takes; None without slopes.
    """

    weights: str
    contract: str
    runtimes: Mapping[str, str]
    tensor_parallel: str | None


@dataclass(frozen=True)
class UsableLengths:
    """How long a text may be, in tokens.

    Attributes:
        trained: The training length.
        usable: The longest text that the model should be served with.
        reason: Why.
        effective_context: Tokens of context that the model was measured to use; None if it was not measured.
        perplexities: For windows without overlap: length, loss in nats per token, perplexity; empty if not measured.
    """

    trained: int
    usable: int
    reason: str
    effective_context: int | None
    perplexities: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Verification:
    """What the exported model was compared in, before the folder took its name.

    Attributes:
        versions: Versions of the packages that read it back.
        held_out_text: Whether the text is held-out text; otherwise the tokens are random.
        lengths: Lengths of the texts whose logits were compared.
        difference: The largest difference of a logit from the trained model's, its weights rounded likewise.
        tolerance: The largest difference allowed.
        largest_logit: The largest absolute logit.
        rounding: What rounding the weights changed, in words; None if nothing.
        texts: Texts whose token ids are those of sentencepiece.
        greedy_tokens: Tokens of a greedy continuation that are the trained model's.
        served: What a server gave; None if none was asked.
    """

    versions: Mapping[str, str | None]
    held_out_text: bool
    lengths: tuple[int, ...]
    difference: float
    tolerance: float
    largest_logit: float
    rounding: str | None
    texts: int
    greedy_tokens: int
    served: ServedText | None


@dataclass(frozen=True)
class ExportCard:
    """The contents of export.json.

    Attributes:
        format_version: Version of these keys.
        format: Name of the export format.
        origin, architecture, precision, lengths, verified: See their classes.
        serving: How to serve the folder.
        files: Size and SHA-256 of each file; export.json itself is left out.
    """

    format_version: int
    format: str
    origin: Origin
    architecture: Architecture
    precision: PrecisionContract
    lengths: UsableLengths
    verified: Verification
    serving: tuple[ServingCommand, ...]
    files: Mapping[str, FileEntry]


def write_export_card(
    folder: Path, result: ExportResult, *, format: str, dtype: str, file: str, reader: Reader, origin: Origin
) -> None:
    """Write EXPORT.md and export.json to a folder whose other files are written.

    Args:
        folder: The exported folder.
        result: How the exported model compared.
        format: Name of the format.
        dtype: Type of its weights.
        file: The file that an engine loads; empty if it loads the folder.
        reader: What runs the model.
        origin: Where the weights come from.
    """
    facts, model = result.facts, result.facts.config.model
    slopes = _slopes(model)
    card = ExportCard(
        format_version=FORMAT_VERSION,
        format=format,
        origin=origin,
        architecture=Architecture(model.model_dump(mode="json"), facts.vocab_size, facts.parameters, slopes),
        precision=PrecisionContract(dtype, _FP32, reader.precision, None if slopes is None else _TENSOR_PARALLEL),
        lengths=_lengths(facts),
        verified=_verification(result, packages=reader.packages),
        serving=tuple(
            replace(each, command=each.command.format(file=file, longest=facts.longest)) for each in reader.serving
        ),
        files=_files(folder),
    )
    (folder / CARD).write_text("\n".join(_markdown(card)) + "\n", encoding="utf-8")
    card = replace(card, files=_files(folder))
    (folder / CARD_JSON).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): describe_file(path) for path in paths}


def _slopes(model: Model) -> tuple[float, ...] | None:
    slopes = POSITIONS[model.position].slopes
    return None if slopes is None else tuple(slopes(model))


def _lengths(facts: ModelFacts) -> UsableLengths:
    measured = whole_windows(facts.report.contents) if facts.report else []
    return UsableLengths(
        trained=facts.train_length,
        usable=facts.longest,
        reason=facts.reason,
        effective_context=facts.effective_context,
        perplexities=tuple({key: each[key] for key in ("length", "loss", "perplexity")} for each in measured),
    )


def _verification(result: ExportResult, *, packages: Sequence[str]) -> Verification:
    return Verification(
        versions={package: installed_version(package) for package in packages},
        held_out_text=result.held_out,
        lengths=result.logits.lengths,
        difference=result.logits.difference,
        tolerance=result.logits.tolerance,
        largest_logit=result.logits.scale,
        rounding=None if result.rounding is None else str(result.rounding),
        texts=result.texts,
        greedy_tokens=result.continued,
        served=result.served,
    )


def _markdown(card: ExportCard) -> Iterator[str]:
    origin, model, lengths = card.origin, card.architecture, card.lengths
    yield f"# Export of {origin.run}\n"
    yield f"Written by trainshort {installed_version('trainshort')}; the same as [export.json]({CARD_JSON}).\n"
    yield "## Model\n"
    sizes = {"format": card.format, "parameters": f"{model.parameters:,}", "vocabulary": f"{model.vocab_size:,}"}
    hashes = {"SHA-256 of the model": origin.model_sha256, "SHA-256 of the tokenizer": origin.tokenizer_sha256}
    shape = {f"`model.{key}`": f"`{json.dumps(value)}`" for key, value in model.model.items()}
    yield from _table(("", ""), {**sizes, "step": f"{origin.step:,}", **hashes, **shape}.items())
    if model.slopes is not None:
        yield "ALiBi's slope of each head, counted from 0 over all heads of the model:\n"
        yield from _table(("head", "slope"), enumerate(map(repr, model.slopes)))
    yield "## Precision\n"
    yield f"The weights are {card.precision.weights}. {card.precision.contract}\n"
    yield from (f"- {runtime}: {what}." for runtime, what in card.precision.runtimes.items())
    if card.precision.tensor_parallel is not None:
        yield f"\nTensor parallelism: {card.precision.tensor_parallel}"
    yield "\n## Lengths\n"
    yield f"Trained at {lengths.trained:,} tokens. Longest text: {lengths.usable:,} tokens, {lengths.reason}.\n"
    if lengths.effective_context is not None:
        yield f"{facts_of_context(lengths.effective_context)}\n"
    if lengths.perplexities:
        rows = ((f"{p['length']:,}", f"{p['loss']:.4f}", f"{p['perplexity']:,.2f}") for p in lengths.perplexities)
        yield from _table(("length", "loss in nats per token", "perplexity"), rows)
    yield from _verified(card.verified)
    yield "## Serving\n"
    yield "In this folder:\n"
    for each in card.serving:
        note = f" ({each.note})" if each.note else ""
        yield f"{each.runtime}{note}:\n\n```{each.language}\n{each.command}\n```\n"
    yield "## Files\n"
    yield from _table(("file", "bytes", "SHA-256"), ((n, f"{f.bytes:,}", f.sha256) for n, f in card.files.items()))


def _verified(seen: Verification) -> Iterator[str]:
    text = "held-out text" if seen.held_out_text else "random tokens"
    lengths = " and ".join(f"{length:,}" for length in seen.lengths)
    yield "## Verified\n"
    yield "Before the folder was written, it was loaded and compared with the trained model:\n"
    yield (
        f"- logits of {text} at {lengths} tokens: they differ by {seen.difference:.2g} at most (allowed "
        f"{seen.tolerance:.2g}, largest {seen.largest_logit:.3g})"
    )
    if seen.rounding is not None:
        yield f"- the trained model was compared with its weights rounded likewise: {seen.rounding}"
    yield f"- a greedy continuation: {seen.greedy_tokens} tokens are equal"
    yield f"- token ids and decoded text of {seen.texts} texts are equal"
    if seen.served is not None:
        yield f"- {seen.served}"
    versions = ", ".join(f"{name} {version}" for name, version in seen.versions.items())
    yield f"\nWith {versions}.\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)
    yield ""
