"""Rules across the keys by which ranks share a model, as those of `configs.rules`."""

from collections.abc import Callable, Iterator
from functools import partial

from configs.figures import divisors
from configs.precisions import PRECISIONS
from configs.schema import RunConfig


def _tensor_heads(config: RunConfig, *, of: str) -> Iterator[str]:
    heads, tensor = config.model.heads, getattr(config, of).tensor
    if heads % tensor:
        yield f"{of}.tensor must divide model.heads ({heads}), got {tensor}: use {divisors(heads)}"


def _tensor_columns(config: RunConfig, *, of: str) -> Iterator[str]:
    inner, tensor = config.model.inner, getattr(config, of).tensor
    if inner % tensor:
        yield f"{of}.tensor must divide model.feed_forward ({inner}), got {tensor}: use {divisors(inner)}"


def _tensor_vocabulary(config: RunConfig, *, of: str) -> Iterator[str]:
    vocab_size, tensor = config.data.vocab_size, getattr(config, of).tensor
    if -(-vocab_size // tensor) * (tensor - 1) >= vocab_size:
        yield (
            f"{of}.tensor {tensor} leaves a rank without any of the {vocab_size} tokens of data.vocab_size: use "
            "fewer tensor ranks, or a larger vocabulary"
        )


def _stages(config: RunConfig, *, of: str) -> Iterator[str]:
    layers, pipeline = config.model.layers, getattr(config, of).pipeline
    if pipeline > layers:
        yield f"{of}.pipeline must be at most model.layers ({layers}), got {pipeline}: use {layers} stages or fewer"


def _zero_with_stages(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pipeline > 1 and parallel.zero != 1:
        yield (
            f"parallel.zero must be 1 with pipeline stages (parallel.pipeline is {parallel.pipeline}), got "
            f"{parallel.zero}: DeepSpeed's pipeline refuses ZeRO 2 and 3 and clips wrongly at ZeRO 0; "
            "set parallel.zero to 1, or parallel.pipeline to 1"
        )


def _sequence(config: RunConfig) -> Iterator[str]:
    parallel, length = config.parallel, config.data.sequence_length
    if parallel.sequence and length % parallel.tensor:
        yield (
            f"data.sequence_length must be a multiple of parallel.tensor ({parallel.tensor}) with parallel.sequence "
            f"true, got {length}: use {length - length % parallel.tensor or parallel.tensor}, or set parallel.sequence "
            "to false"
        )


def _zero_with_offload(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.zero == 0 and parallel.offload != "none":
        yield (
            f"parallel.zero must be 1 or more with parallel.offload {parallel.offload}, got 0: "
            "ZeRO keeps the state that is offloaded"
        )


def _overlap(config: RunConfig) -> Iterator[str]:
    parallel, precision = config.parallel, config.train.precision
    with_one_buffer = PRECISIONS[precision].dtype == "bfloat16" and parallel.zero == 1 and parallel.offload == "none"
    if parallel.overlap and not with_one_buffer:
        yield (
            "parallel.overlap true needs train.precision bf16, parallel.zero 1 and parallel.offload none, got "
            f"{precision}, {parallel.zero} and {parallel.offload}: set it to false"
        )


def _zero_with_precision(config: RunConfig) -> Iterator[str]:
    if config.parallel.zero == 0 and PRECISIONS[config.train.precision].master_weights:
        yield (
            f"parallel.zero must be 1 or more with train.precision {config.train.precision}, got 0: "
            "ZeRO keeps the fp32 master weights"
        )


# Rules of each section that splits the model: those of training and of `evaluate`.
_SPLITS = (_tensor_heads, _tensor_columns, _tensor_vocabulary, _stages)
PARALLEL_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    *(partial(rule, of="parallel") for rule in _SPLITS),
    *(partial(rule, of="evaluate") for rule in _SPLITS),
    _zero_with_stages,
    _sequence,
    _zero_with_offload,
    _overlap,
    _zero_with_precision,
)
