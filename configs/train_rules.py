"""Rules across the keys of the section `train`, as those of `configs.rules`."""

from collections.abc import Callable, Iterator, Sequence

from configs.figures import divisors
from configs.schedules import SCHEDULES, cooldown_steps, schedule_steps
from configs.schema import RunConfig, Train
from configs.step_sizes import batches_of, lengths_of


def _warmup(config: RunConfig) -> Iterator[str]:
    train, steps = config.train, schedule_steps(config.train)
    if SCHEDULES[train.schedule].falls and train.warmup_steps >= steps:
        yield (
            f"train.warmup_steps must be less than the schedule's steps ({steps}), got {train.warmup_steps}: "
            f"lower it or {_more_steps(train)}"
        )


def _cooldown(config: RunConfig) -> Iterator[str]:
    train, steps = config.train, schedule_steps(config.train)
    if not SCHEDULES[train.schedule].cools_down:
        # a constant trunk may hold the keys of its cooldowns
        if train.cooldown_steps is not None and SCHEDULES[train.schedule].falls:
            yield (
                f"train.cooldown_steps is {train.cooldown_steps}, but train.schedule {train.schedule} has no cooldown: "
                f"remove it, or set train.schedule to {_schedules_with_cooldown()}"
            )
        return
    cooldown = cooldown_steps(train)
    if train.warmup_steps < steps < train.warmup_steps + cooldown:
        default = "" if train.cooldown_steps else ", as it is not set"
        yield (
            f"train.warmup_steps ({train.warmup_steps}) and train.cooldown_steps ({cooldown}{default}) must fit into "
            f"the schedule's steps ({steps}): lower one or {_more_steps(train)}"
        )


def _more_steps(train: Train) -> str:
    # the schedule of a run that has started is fixed, and no rule knows its folder
    if train.decay_steps is None:
        return "set train.decay_steps (that of RUN_DIR/config.yaml, if the run has started)"
    return "raise train.decay_steps"


def _schedules_with_cooldown() -> str:
    return " or ".join(name for name, schedule in SCHEDULES.items() if schedule.cools_down)


def _learning_rates(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.min_learning_rate > train.learning_rate:
        yield (
            f"train.min_learning_rate must be at most train.learning_rate ({train.learning_rate}), "
            f"got {train.min_learning_rate}: lower it"
        )


def _batches(config: RunConfig) -> Iterator[str]:
    train, batches = config.train, batches_of(config.train)
    yield from _growing(batches, key="train.batch_warmup", what="batches", below="train.global_batch")
    for batch in batches[:-1]:
        if batch % train.micro_batch:
            yield (
                f"train.micro_batch must divide the batches of train.batch_warmup, got {train.micro_batch} and "
                f"{batch}: use {divisors(batch)}"
            )
            return


def _lengths(config: RunConfig) -> Iterator[str]:
    length, lengths = config.data.sequence_length, lengths_of(config)
    yield from _growing(lengths, key="train.length_warmup", what="lengths", below="data.sequence_length")
    for shorter in lengths[:-1]:
        if length % shorter:
            yield (
                f"the lengths of train.length_warmup must divide data.sequence_length ({length}), got {shorter}: use "
                f"{divisors(length)}"
            )
            return
        if config.parallel.sequence and shorter % config.parallel.tensor:
            yield (
                f"with parallel.sequence, parallel.tensor ({config.parallel.tensor}) must divide the lengths of "
                f"train.length_warmup, got {shorter}: use a multiple"
            )
            return


def _growing(values: Sequence[int], *, key: str, what: str, below: str) -> Iterator[str]:
    *smaller, full = values
    if list(values) != sorted(set(values)):
        got = ", ".join(map(str, smaller))
        yield f"{key} must have growing {what} below {below} ({full}), got {got}: lower or order them"


def _beginning(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.init_from is not None and train.branch_from is not None:
        yield (
            f"train.init_from is {train.init_from} and train.branch_from is {train.branch_from}: remove one; a branch "
            "continues with optimizer state and step, train.init_from takes the weights alone"
        )


_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _warmup,
    _cooldown,
    _learning_rates,
    _batches,
    _lengths,
    _beginning,
)


def train_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line per rule of the section that a run breaks."""
    return (problem for rule in _RULES for problem in rule(config))
