"""`trainshort import`: a BLOOM, MPT or Jais model of a Hugging Face folder becomes a checkpoint of step 0."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from configs.choices import FAMILIES
from configs.errors import InputError, TrainshortError
from configs.paths import TOKENIZER_NAME, checkpoints_folder, name_of_folder
from configs.positions import slopes
from configs.rules import problems
from configs.schema import Data, Run, RunConfig, Train
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from parallel.compilers import check_cache_folder
from parallel.start import environment
from training.checkpoint.manifest import step_folder
from training.checkpoint.read import open_checkpoint
from training.checkpoint.weights_only import write_weights_only
from training.export.folder import new_folder, report_failed_writes, require_space, try_new_folder
from training.export.format_weights import from_format, scale_queries, shape_in
from training.export.formats.huggingface import (
    HuggingFaceFormat,
    TransformersModel,
    load_exported,
    refusing_unreadable,
)
from training.export.formats.jais import JaisModel, JaisShape
from training.export.formats.mpt import with_slopes
from training.export.hf_model import IncomingModel, read_model
from training.export.hf_weights import HuggingFaceWeights
from training.export.parity import LOGIT_TOLERANCE
from training.families.description import Parameter
from training.families.jais import JAIS
from training.families.mpt import MPT
from training.families.table import describe
from training.model.single import load_single
from training.state import TrainState

_PREFIX = "transformer."  # transformers saves a model without its head under names without it
_FP32 = 4


@dataclass(frozen=True)
class ImportResult:
    """An imported model.

    Attributes:
        checkpoint: Its checkpoint.
        parameters: Number of its parameters.
        length: Tokens of the text on which its logits were compared.
        reference: With whose.
        difference: The largest difference of a logit.
        scale: The largest absolute logit.
    """

    checkpoint: Path
    parameters: int
    length: int
    reference: str
    difference: float
    scale: float

    def __str__(self) -> str:
        return (
            f"{self.checkpoint}: {self.parameters:,} parameters; logits of {self.length} random tokens differ from "
            f"{self.reference} by {self.difference:.2g} at most (largest {self.scale:.3g})"
        )


def import_model(source: Path, *, out: Path, train_length: int | None = None) -> ImportResult:
    """Write a Hugging Face folder's model as the checkpoint of a new run folder, after comparing their logits.

    Tensors are read and written one at a time; to compare them, each model is in memory once, one after the other.

    Args:
        source: A folder with config.json, weights and a tokenizer.
        out: A folder that does not exist or is empty; it will hold checkpoints/step_0000000.
        train_length: Tokens that the model was trained at; None for what its configuration says.
    Raises:
        InputError: the model cannot be represented exactly, a file is broken or missing, or `out` has files.
        MachineError: the disk is too small or failing.
        TrainshortError: the checkpoint's logits differ from transformers'; it is deleted.
    """
    check_cache_folder(environment())  # transformers makes it
    try_new_folder(out)
    incoming = read_model(source)
    tokenizer = _tokenizer(source, incoming)
    config = _run_config(source, incoming, out=out, train_length=train_length)
    weights = HuggingFaceWeights(source)
    names = _names(weights, incoming)
    parameters = sum(prod(each.shard.shape) for each in names)
    require_space(out, needed_bytes=_FP32 * parameters)
    with new_folder(out) as folder:
        with report_failed_writes(out, undone="imported"):
            step = step_folder(checkpoints_folder(folder), step=0)
            step.mkdir(parents=True)
            write_weights_only(
                step,
                _ordered(names, weights, incoming),
                shards=[each.shard for each in names],
                state=TrainState(step=0, consumed_samples=0),
                config=config,
                tokenizer=tokenizer.path,
                vocab_size=incoming.vocab_size,
            )
        length = min(config.data.sequence_length, HuggingFaceFormat().length_limit(incoming.model).tokens)
        tokens = torch.randint(incoming.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            reference, theirs = _their_logits(names, weights, incoming, tokens)  # one model is in memory at a time
        difference, scale = _compare(step, tokens, theirs, reference=reference)
    checkpoint = step_folder(checkpoints_folder(out), step=0)
    return ImportResult(checkpoint, parameters, length, reference, difference, scale)


def _tokenizer(source: Path, incoming: IncomingModel) -> Tokenizer:
    model = source / TOKENIZER_NAME
    # An export of ours has both; sentencepiece's own file is the one that it was trained with.
    tokenizer = load_tokenizer(model if model.is_file() else source)
    if tokenizer.vocab_size > incoming.vocab_size:
        raise InputError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model {incoming.vocab_size} rows: it is another "
            "model's"
        )
    if incoming.end_token is not None and incoming.end_token != tokenizer.end_of_document:
        raise InputError(
            f"{tokenizer.path} ends a document with token {tokenizer.end_of_document}, config.json says eos_token_id "
            f"{incoming.end_token}: make them agree"
        )
    return tokenizer


def _run_config(source: Path, incoming: IncomingModel, *, out: Path, train_length: int | None) -> RunConfig:
    """Return a run that describes the model. It was not trained here, so its `train` section says nothing."""
    length = train_length or incoming.train_length
    if length is None:
        raise InputError(f"{source / 'config.json'} does not say at which length the model was trained: give --length")
    data = {"sources": [str(source)], "vocab_size": incoming.vocab_size, "sequence_length": length}
    try:
        config = RunConfig(
            run=Run(name=name_of_folder(out), dir=str(out)),
            model=incoming.model,
            data=Data.model_validate(data),
            train=Train(micro_batch=1, global_batch=1, steps=1, decay_steps=1, learning_rate=1e-4),
        )
    except ValidationError as error:
        first = error.errors()[0]
        key, said = ".".join(map(str, first["loc"])), first["msg"]
        raise InputError(f"{source} cannot be a run: data.{key} {first['input']!r}: {said}") from None
    for problem in problems(config):
        raise InputError(f"{source / 'config.json'} describes no model that can run: {problem}")
    return config


def _names(weights: HuggingFaceWeights, incoming: IncomingModel) -> dict[Parameter, str]:
    """Return the name in the folder of each parameter, after checking that names and shapes are the model's.

    Raises:
        InputError: names a tensor that is missing, not known, or of another shape.
    """
    described = describe(incoming.model, vocab_size=incoming.vocab_size)
    names = {each: _name_in(weights, str(each.huggingface)) for each in described}
    layout = FAMILIES[incoming.model.family].load().huggingface
    for each, name in names.items():
        if name not in weights:
            raise InputError(f"{weights.folder} has no tensor {name}, which its config.json implies: download it again")
        if (shape := weights.shape(name)) != (implied := shape_in(layout, each)):
            raise InputError(
                f"{weights.folder} has {name} as {list(shape)}, its config.json implies {list(implied)}: they "
                "are of different models"
            )
    for name in sorted(weights.keys() - {*names.values()}):
        if not (_is_tied_copy(name, weights, names) or _is_implied(name, weights, incoming)):
            raise InputError(
                f"{weights.folder} has a tensor {name}, for which {incoming.model.family.upper()} has no place: it "
                "cannot be represented exactly, so it is not imported"
            )
    return names


def _name_in(weights: Mapping[str, Tensor], name: str) -> str:
    short = name.removeprefix(_PREFIX)
    return short if short in weights else name


def _is_tied_copy(name: str, weights: Mapping[str, Tensor], names: Mapping[Parameter, str]) -> bool:
    """Return whether a tensor is the word embedding again, which older versions of transformers saved twice."""
    return name == "lm_head.weight" and torch.equal(weights[name], weights[next(iter(names.values()))])


def _is_implied(name: str, weights: Mapping[str, Tensor], incoming: IncomingModel) -> bool:
    """Return whether a tensor says what the configuration says: causal masks of each block, the heads' slopes."""
    if incoming.model.family != JAIS.name:
        return False
    if name.endswith(".relative_pe.slopes") or name == "relative_pe.slopes":
        expected = torch.tensor(slopes(incoming.model.heads))
        seen = weights[name].flatten()
        return seen.shape == expected.shape and torch.allclose(seen, expected, rtol=1e-2)  # 16 bits have 8 of them
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _ordered(
    names: Mapping[Parameter, str], weights: Mapping[str, Tensor], incoming: IncomingModel
) -> Iterator[Tensor]:
    """Yield each weight as we have it, with what the model multiplies by when it runs."""
    model, scales = incoming.model, incoming.scales
    factors = {"embedding.word.weight": scales.embedding, "head.weight": scales.logits}
    if model.tie_embeddings:  # the last norm's output is what the word embedding is multiplied with
        factors |= dict.fromkeys(("final_norm.weight", "final_norm.bias"), scales.logits / scales.embedding)
    layout = FAMILIES[model.family].load().huggingface
    for each, name in names.items():
        weight = from_format(layout, each, weights[name], model=model)
        if each.is_qkv and scales.divides_by_width:
            weight = scale_queries(weight, model=model, by=model.head_dim**-0.5)
        factor = factors.get(each.shard.name, 1.0)
        yield weight if factor == 1.0 else weight * factor


def _their_logits(
    names: Mapping[Parameter, str], weights: HuggingFaceWeights, incoming: IncomingModel, tokens: Tensor
) -> tuple[str, Tensor]:
    """Return the logits of tokens, [1, seq], by the folder's model, and whose they are, in words.

    Raises:
        InputError: transformers cannot load its model.
    """
    model = incoming.model
    if model.family == JAIS.name:
        shape = JaisShape(model.layers, model.heads, model.alibi_bias_max, incoming.scales, transposes=True)
        their_weights = {str(each.huggingface): weights[name] for each, name in names.items()}
        return "those of Jais's formula", JaisModel(their_weights, shape)(tokens)
    # transformers' Mpt takes no longer text than max_seq_len, which changes nothing else
    options = {"max_seq_len": tokens.shape[1]} if model.family == MPT.name else {}
    with refusing_unreadable(weights.folder):
        loaded = load_exported(weights.folder, **options)
    return "transformers'", TransformersModel(with_slopes(loaded, model.alibi_bias_max))(tokens)


def _compare(checkpoint: Path, tokens: Tensor, theirs: Tensor, *, reference: str) -> tuple[float, float]:
    """Compare the checkpoint's logits of tokens with those of the folder's model; return the largest difference, logit.

    Raises:
        TrainshortError: they differ by more than `LOGIT_TOLERANCE`, relative to the largest logit or 1.
    """
    length = tokens.shape[1]
    ours = load_single(open_checkpoint(checkpoint)).logits(tokens)
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= LOGIT_TOLERANCE * max(1.0, scale):  # nan fails too
        raise TrainshortError(
            f"the imported model's logits differ from {reference} by {difference:.3g} at length {length} (largest "
            f"logit {scale:.3g}): nothing was imported; report this"
        )
    return difference, scale
