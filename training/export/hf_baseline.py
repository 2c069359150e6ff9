"""`trainshort evaluate --hf DIR`: a causal model of Hugging Face, on the text of a run; an export, or a baseline."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn

from configs.errors import InputError, first_line
from configs.files import in_use
from configs.paths import evaluation_folder
from configs.precisions import require_precision
from data_pipeline.hashes import json_sha256
from data_pipeline.token_file import TokenFile
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from parallel.compilers import check_cache_folder
from parallel.start import environment
from training.checkpoint.disk import describe_file
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.evaluation.folder import check_evaluation_folder
from training.evaluation.kept import OTHER_MODEL
from training.evaluation.partial import PartialResults
from training.evaluation.provenance import EvaluatedModel, product_versions, provenance_of
from training.evaluation.record import EvaluationRecord
from training.evaluation.report import build_report
from training.evaluation.request import EvaluationRequest
from training.evaluation.run import plan_evaluation, run_evaluation
from training.evaluation.text import EvaluationText, file_text, held_out_text
from training.export.card import CARD_JSON
from training.export.formats.huggingface import HuggingFaceTokenizer, quiet_transformers, refusing_unreadable
from training.model.proof.attention_weights import dtype_of
from training.model.single import CPU_BATCH_TOKENS, inference, inference_device

_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
_ANY_VOCABULARY = 1 << 30
_GPU_BATCH_TOKENS = 8192  # transformers keeps the logits of all of them in memory
# keys of configurations that say how long a training sequence was
_LENGTH_KEYS = ("train_length", "seq_length", "max_seq_len", "n_positions", "max_position_embeddings")


class TransformersScorer:
    """Implement `Scorer` with a causal model that transformers has loaded.

    Attributes:
        batch_tokens: Inputs of one pass.
    """

    def __init__(self, model: Any, *, device: torch.device, precision: str) -> None:
        self._model, self._device, self._precision = model.to(device).eval(), device, require_precision(precision)
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else _GPU_BATCH_TOKENS

    def losses(self, tokens: Tensor, *, last: int | None = None) -> Tensor:
        """Return the losses of the last predicted tokens, [batch, last] fp32; see `Scorer`."""
        tokens, last = tokens.to(self._device), last or tokens.shape[1] - 1
        options = {"logits_to_keep": last} if self._keeps_last else {}
        with inference(self._precision):
            logits = self._model(input_ids=tokens[:, :-1], use_cache=False, **options).logits[:, -last:]
            targets = tokens[:, -last:]
            return nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def evaluate_folder(checkpoint: Path, folder: Path, request: EvaluationRequest) -> dict[str, Any]:
    """Measure a folder's model on the text of a run; keep the report in RUN_DIR/evaluation/hf-NAME.

    Args:
        checkpoint: A checkpoint of the run, or the run folder.
        folder: A folder with a causal model and its tokenizer. No code in it is run.
        request: What to measure.
    Returns:
        The contents of the report.
    Raises:
        InputError: the folder holds no such model, it cannot take a length, or see `evaluate_checkpoint`.
        MachineError, ReportNotWritten: see `evaluate_checkpoint`.
    """
    device = inference_device(request.precision)
    check_cache_folder(environment())  # transformers makes it
    opened = open_checkpoint(checkpoint)
    of_run = held_out_text(opened) if request.data is None else file_text(opened, request.data)
    text = _text_for(folder, opened, of_run)
    plan = plan_evaluation(request, config=opened.config, tokens=len(text.tokens))
    model = _load(folder, precision=request.precision)
    _require_rows(model, folder, text.tokens)
    _require_lengths(model, folder, longest=max(each.length for each in plan.measurements))
    place, name = evaluation_folder(opened.run_dir), OTHER_MODEL + re.sub(r"[^\w.-]+", "-", folder.resolve().name)
    check_evaluation_folder(place, name=name)
    provenance = provenance_of(
        opened,
        of_run.tokens,
        data=request.data,
        command=request.command,
        weights_sha256=_model_sha256(folder),
        versions=product_versions("transformers", "tokenizers"),
    )
    evaluated = _described(model, folder, precision=request.precision, length_of_run=opened.train_length)
    record = EvaluationRecord(
        partial(build_report, model=evaluated, text=text, provenance=provenance), place, name, is_newest=False
    )
    with in_use(opened.path.parent):
        return run_evaluation(
            TransformersScorer(model, device=device, precision=request.precision),
            text,
            plan,
            record=record,
            parts=PartialResults(place / name, evaluated, provenance),
            tracker=None,  # its figures are not the run's
            attention=None,
        )


def _described(model: Any, folder: Path, *, precision: str, length_of_run: int) -> EvaluatedModel:
    """Return what a report says of a model; one that states no length is taken to have the run's."""
    stated = [getattr(model.config, key, None) for key in _LENGTH_KEYS]
    lengths = [length for length in stated if isinstance(length, int) and length > 0]
    return EvaluatedModel(
        path=folder.absolute(),
        step=0,
        train_length=lengths[0] if lengths else length_of_run,
        position=str(model.config.model_type),
        attention=f"transformers' {getattr(model.config, '_attn_implementation', None) or 'eager'}",
        precision=precision,
    )


def _load(folder: Path, *, precision: str) -> Any:
    loader: Any = transformers.AutoModelForCausalLM  # untyped in transformers
    with refusing_unreadable(folder), quiet_transformers():
        model, loading = loader.from_pretrained(
            folder,
            dtype=dtype_of(precision),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else transformers tells of them in a report of many lines
        )
    if missing := sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]):
        raise InputError(
            f"{folder} lacks weights that its config.json implies, such as {missing[0]}, or has them in other shapes: "
            "download it again"
        )
    return model


def _require_rows(model: Any, folder: Path, tokens: npt.NDArray[np.integer[Any]]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        InputError: the tokenizer is another model's.
    """
    rows, largest = model.get_input_embeddings().num_embeddings, int(tokens.max(initial=0))
    if largest >= rows:
        raise InputError(
            f"{folder} has a tokenizer with token {largest}, and a model of {rows}: use tokenizer and weights of one "
            "model"
        )


def _require_lengths(model: Any, folder: Path, *, longest: int) -> None:
    """Refuse lengths beyond a learned table of positions, which has no row for them.

    Raises:
        InputError: it is shorter than the longest length.
    """
    limits = [
        module.num_embeddings - _first_position(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"pos|wpe", name)
    ]
    if limits and longest > min(limits):
        raise InputError(
            f"the model in {folder} has learned positions up to {min(limits)}, so it cannot take {longest} tokens: use "
            f"--lengths up to {min(limits)}"
        )


def _first_position(table: nn.Embedding) -> int:
    """Return the row of the first token: OPT's come after an offset, RoBERTa's after that of padding."""
    after_padding = 0 if table.padding_idx is None else table.padding_idx + 1
    return int(getattr(table, "offset", after_padding))


def _text_for(folder: Path, checkpoint: Checkpoint, text: EvaluationText) -> EvaluationText:
    """Return a text in the tokens of a folder's tokenizer; the same tokens if it is the checkpoint's.

    Its model sees all of a window: it knows of no documents.
    """
    if _exported_tokenizer(folder) == checkpoint.manifest.tokenizer_sha256:
        return replace(text, begins=None)
    try:
        tokenizer = HuggingFaceTokenizer(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no tokenizer ({first_line(error)}): copy it into the folder") from None
    starts = []
    with TokenFile(vocab_size=_ANY_VOCABULARY) as file:
        for part, is_start, is_end in _parts(text, load_tokenizer(checkpoint.tokenizer)):
            ids = tokenizer.encode(part) + ([tokenizer.end] if is_end and tokenizer.end is not None else [])
            starts += [file.count] if is_start and ids else []
            file.add(ids)
        tokens = file.read()
    return EvaluationText(text.name, tokens, text.words, None, np.array(starts, np.int64))


def _parts(text: EvaluationText, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Yield the text between ends of documents, whether a document begins there, and whether one ends."""
    documents: npt.NDArray[np.int64] = np.zeros(1, np.int64) if text.documents is None else text.documents
    ends = np.flatnonzero(text.tokens == tokenizer.end_of_document) + 1
    cuts = np.unique([0, *documents.tolist(), *ends.tolist(), len(text.tokens)])
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        ids = text.tokens[start:end]
        spelled = tokenizer.spell(ids.tolist()).decode("utf-8", "replace")
        yield spelled, start in documents, int(ids[-1]) == tokenizer.end_of_document


def _exported_tokenizer(folder: Path) -> str | None:
    """Return the hash of the tokenizer that an export of ours was compared with; None for another folder."""
    try:
        card = json.loads((folder / CARD_JSON).read_text(encoding="utf-8"))
        return str(card["origin"]["tokenizer_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _model_sha256(folder: Path) -> str:
    """Return the hash of a folder's weights, configuration and tokenizer."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file())
    return json_sha256({file.name: describe_file(file).sha256 for file in files})
