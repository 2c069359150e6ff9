"""Rules across the keys of a run file. Each reports problems and repairs nothing."""

import re
from collections.abc import Callable, Iterator
from posixpath import normpath

from configs.backends import BACKENDS, EVERYWHERE, named_backend, unsupported
from configs.errors import InputError
from configs.figures import divisors
from configs.parallel_rules import PARALLEL_RULES
from configs.positions import ALIBI_BIAS_MAX, POSITIONS
from configs.protocols import PROTOCOL_NAMES, WindowProtocol, parse_protocol
from configs.schema import RunConfig
from configs.secrets import hide_secrets
from configs.train_rules import train_problems


def problems(config: RunConfig, *, partial: bool = False) -> list[str]:
    """Return every broken rule, one line each: what must hold, the value seen, what to do.

    Args:
        config: The run.
        partial: Whether some keys are not set: reading one raises AttributeError, and rules about it are skipped.
    """
    broken: list[str] = []
    for rule in _RULES:
        try:
            for line in rule(config):
                broken.append(line)
        except AttributeError:
            if not partial:
                raise
    return broken


def time_limit_seconds(text: str) -> int | None:
    """Return a SLURM time limit in seconds; None unless it is [days-]hours:minutes:seconds or days-hours[:minutes].

    SLURM also takes `90` as minutes and `1:30` as minutes and seconds. Both are refused: people who write them
    usually mean hours.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)-(\d+)(?::(\d\d))?", text)
    if match is None:
        return None
    # groups 1 to 4 are of the first form, 5 to 7 of the second, which has no seconds
    days, hours, minutes, seconds = (int(match[n] or match[m] or 0) for n, m in ((1, 5), (2, 6), (3, 7), (4, 4)))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _heads(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.hidden % model.heads:
        yield f"model.heads must divide model.hidden ({model.hidden}), got {model.heads}: use {divisors(model.hidden)}"


def _position(config: RunConfig) -> Iterator[str]:
    yield from POSITIONS[config.model.position].problems(config.model)


def _bias_max(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.alibi_bias_max != ALIBI_BIAS_MAX and POSITIONS[model.position].slopes is None:
        yield (
            f"model.alibi_bias_max is {model.alibi_bias_max}, but model.position {model.position} has no slopes: "
            "remove it or set model.position to alibi"
        )


def _attention(config: RunConfig) -> Iterator[str]:
    model = config.model
    backend = named_backend(model.attention) or BACKENDS[EVERYWHERE]  # auto falls back to it
    why = unsupported(
        backend,
        position=model.position,
        precision=config.train.precision,
        head_dim=model.head_dim,
        documents=config.data.mask_documents,
    )
    if why is not None:
        yield f"model.attention {why}"


def _weights(config: RunConfig) -> Iterator[str]:
    weighted = [source for source in config.data.sources if source.weight is not None]
    if weighted and len(weighted) < len(config.data.sources):
        yield (
            f"data.sources must all have a weight or none, got {len(weighted)} of {len(config.data.sources)} "
            "with one: write each as {path: ..., weight: ...}"
        )


def _micro_batch(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.global_batch % train.micro_batch:
        yield (
            f"train.micro_batch must divide train.global_batch ({train.global_batch}), "
            f"got {train.micro_batch}: use {divisors(train.global_batch)}"
        )


def _keep_every(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.keep_every % checkpoint.every:
        yield (
            f"checkpoint.keep_every must be a multiple of checkpoint.every ({checkpoint.every}), "
            f"got {checkpoint.keep_every}: no other step is saved"
        )


def _export_every(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.export_every % checkpoint.every:
        yield (
            f"checkpoint.export_every must be a multiple of checkpoint.every ({checkpoint.every}), "
            f"got {checkpoint.export_every}: no other step is saved"
        )


def _keep_best(config: RunConfig) -> Iterator[str]:
    checkpoint, measured = config.checkpoint, config.evaluate.every
    if checkpoint.keep_best and (not measured or checkpoint.every % measured):
        yield (
            f"checkpoint.keep_best is {checkpoint.keep_best}, but not every saved step has a validation loss: "
            f"set evaluate.every ({measured}) to checkpoint.every ({checkpoint.every}) or a divisor of it"
        )


def _protocols(config: RunConfig) -> Iterator[str]:
    for name in config.evaluate.protocols:
        if _protocol(name) is None:
            yield f"evaluate.protocols has {name!r}: use {PROTOCOL_NAMES}"


def _strides(config: RunConfig) -> Iterator[str]:
    shortest = min(config.evaluation_lengths)
    for name in config.evaluate.protocols:
        protocol = _protocol(name)
        if protocol and protocol.scored and protocol.scored > shortest:
            what = "a stride over" if protocol.stride else "more tokens than"
            yield (
                f"evaluate.protocols has {name!r}, {what} the shortest evaluated length ({shortest}): use at most that"
            )


def _protocol(name: str) -> WindowProtocol | None:
    try:
        return parse_protocol(name)
    except InputError:
        return None


def _validation(config: RunConfig) -> Iterator[str]:
    if config.evaluate.every and not config.data.split:
        yield (
            f"evaluate.every is {config.evaluate.every} but data.split is 0, so nothing is held out: "
            "set data.split to 0.02"
        )
    for key, value in (("validation_lengths", [*config.evaluate.validation_lengths]), ("by_source", "true")):
        if getattr(config.evaluate, key) and not config.evaluate.every:
            yield (
                f"evaluate.{key} is {value} but evaluate.every is 0, so nothing is validated: set evaluate.every to "
                "the steps between two validations"
            )


def _validation_lengths(config: RunConfig) -> Iterator[str]:
    further, tensor = config.evaluate.validation_lengths, config.parallel.tensor
    if not further:
        return
    lengths = {config.data.sequence_length, *further}
    longest = max(lengths)
    if other := [length for length in sorted(lengths) if longest % length]:
        yield (
            f"data.sequence_length and evaluate.validation_lengths must divide the longest of them ({longest}), got "
            f"{', '.join(map(str, other))}: the same text is cut into each length, so use multiples such as "
            f"{2 * config.data.sequence_length} and {4 * config.data.sequence_length}"
        )
    if config.parallel.sequence and (other := [length for length in further if length % tensor]):
        yield (
            f"with parallel.sequence, parallel.tensor ({tensor}) must divide evaluate.validation_lengths, got "
            f"{', '.join(map(str, other))}: use multiples"
        )


def _sources_apart(config: RunConfig) -> Iterator[str]:
    sources = config.data.sources
    if config.evaluate.by_source and any(source.weight is None for source in sources):
        yield (
            "evaluate.by_source is true but not all of data.sources have a weight: without weights they are prepared "
            "as one; write each as {path: ..., weight: ...}, or set it to false"
        )


def _memory(config: RunConfig) -> Iterator[str]:
    memory = config.slurm.memory
    if memory is not None and not re.fullmatch(r"[1-9]\d*[MGT]", memory):
        yield f'slurm.memory must be a number with M, G or T, got {memory!r}: write "500M" or "500G"'


def _requests(config: RunConfig) -> Iterator[str]:
    for key in ("partition", "account", "qos", "constraint"):
        value = getattr(config.slurm, key, None)  # None also where a partial run does not have the key
        if value is not None and not value.strip():
            yield f"slurm.{key} must not be empty, got {value!r}: write a name, or remove the key"


def _mounts(config: RunConfig) -> Iterator[str]:
    slurm = config.slurm
    if slurm.mounts and not slurm.container:
        yield f"slurm.mounts is {list(slurm.mounts)} but slurm.container is not set: set it or remove slurm.mounts"


def _variables(config: RunConfig) -> Iterator[str]:
    for name in config.slurm.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"slurm.env has {name!r}, which cannot name an environment variable: use letters, digits and _"


def _tags(config: RunConfig) -> Iterator[str]:
    for name in config.track.tags:
        # MLflow refuses other names, and with one tag all parameters of the start; to it, a name is a path
        is_path = normpath(name) == name and not name.startswith(("/", "..")) and name != "."
        if not (is_path and re.fullmatch(r"[\w.: /-]{1,250}", name)):
            yield (
                f"track.tags has {name!r}, which MLflow refuses as the name of a tag: use at most 250 letters, digits, "
                "blanks and _ - . : /"
            )


def _hook(config: RunConfig) -> Iterator[str]:
    hook = config.track.hook or ""
    if "\0" in hook:
        yield f"track.hook has a NUL, {hook!r}, which no command can hold: remove it"
    if hide_secrets(hook) != hook:
        yield (
            f"track.hook contains a secret, {hide_secrets(hook)!r}, which MLflow and config.yaml would show: write "
            "$NAME, and set that environment variable"
        )


def _one_line(config: RunConfig) -> Iterator[str]:
    for key in ("partition", "account", "qos", "constraint", "container", "mounts", "modules", "setup"):
        values = getattr(config.slurm, key, None) or ()  # None also where a partial run does not have the key
        for value in (values,) if isinstance(values, str) else values:
            if "\n" in value:
                yield f"slurm.{key} must be one line, got {value!r}: remove the line break"


def _extra(config: RunConfig) -> Iterator[str]:
    for option in config.slurm.extra:
        if not re.fullmatch(r"-.+", option):
            yield f"slurm.extra has {option!r}: write one option per line, as in --exclusive"
        elif re.search(r"(^|\s)(-J|--job-name)", option):
            yield f"slurm.extra has {option!r}, but job names come from run.name: set that and remove the option"


def _time_limit(config: RunConfig) -> Iterator[str]:
    time = config.slurm.time
    if not time_limit_seconds(time):
        yield (
            f'slurm.time must be hours:minutes:seconds in quotes, got {time}: write "1:30:00" or "2-00:00:00" '
            "(SLURM takes a number alone for minutes, and YAML may make a number of 1:30:00)"
        )


def _signal(config: RunConfig) -> Iterator[str]:
    slurm = config.slurm
    limit = time_limit_seconds(slurm.time)
    if limit and limit <= slurm.signal_seconds:
        yield (
            f"slurm.signal_seconds must be less than slurm.time ({slurm.time}, {limit} seconds), "
            f"got {slurm.signal_seconds}: lower it or raise slurm.time"
        )


def _ranks_of_a_node(config: RunConfig) -> Iterator[str]:
    slurm = config.slurm
    gpus, ranks = slurm.gpus_per_node, slurm.ranks_per_node
    on_cpus = slurm.env.get("CUDA_VISIBLE_DEVICES") == ""  # in a partition whose jobs must ask for a GPU
    if gpus and ranks and ranks > gpus and not on_cpus:
        yield (
            f"slurm.ranks_per_node must be at most slurm.gpus_per_node ({gpus}), got {ranks}: a rank needs a GPU of "
            "its own; lower it, or set slurm.gpus_per_node to 0 for CPU ranks"
        )


# A rule about each few keys that belong together: where one of them is wrong, the others are still checked.
_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _heads,
    _position,
    _bias_max,
    _attention,
    *PARALLEL_RULES,
    _weights,
    _micro_batch,
    train_problems,
    _keep_every,
    _export_every,
    _keep_best,
    _protocols,
    _strides,
    _validation,
    _validation_lengths,
    _sources_apart,
    _memory,
    _requests,
    _mounts,
    _tags,
    _hook,
    _variables,
    _one_line,
    _extra,
    _time_limit,
    _signal,
    _ranks_of_a_node,
)
