"""The lines that tell a person how a run goes; each fits 80 columns if its paths are short. Imports no torch."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from configs.backends import Backend
from configs.commands import typed_path
from configs.figures import byte_size, counted, duration, scaled
from configs.positions import POSITIONS
from configs.schedules import SCHEDULES, schedule_steps
from configs.schema import RunConfig
from configs.step_sizes import StepSize, samples_until, size_of
from training.families.table import parameter_count
from training.least_density import attention_here
from training.metrics_file import Best
from training.observers import Save, StepResult
from training.pace import Spent
from training.state import TrainState

if TYPE_CHECKING:
    from training.model.proof.certificate import Certificate  # it imports torch
    from training.preflight import Ready  # it imports numpy


def tokens_in_all(config: RunConfig, *, start: TrainState) -> int:
    """Return the tokens of all steps; those up to a position may have had another batch, that of a branch's trunk."""
    return start.consumed_samples * config.data.sequence_length + tokens_between(start.step, config.train.steps, config)


def tokens_between(first: int, last: int, config: RunConfig) -> int:
    """Return the tokens of the steps after one and up to another."""
    return (samples_until(last, config.train) - samples_until(first, config.train)) * config.data.sequence_length


def step_tokens(config: RunConfig, *, after: int = 0) -> str:
    """Return the tokens of a step after some: 1,024, or 256 to 1,024 if the run takes smaller batches first."""
    return _first_to_last([size.batch * config.data.sequence_length for size in _sizes(config, after=after)])


def step_lengths(config: RunConfig, *, after: int = 0) -> str:
    """Return the lengths of sequences after some steps: 1,024, or 256 to 1,024 if the run takes shorter ones first."""
    return _first_to_last([size.length for size in _sizes(config, after=after)])


def _sizes(config: RunConfig, *, after: int) -> list[StepSize]:
    """Return the smallest and the largest step after some: the first and the last, which may lie in a warm-up."""
    return [size_of(step, config) for step in (after + 1, config.train.steps)]


def _first_to_last(numbers: Sequence[int]) -> str:
    return " to ".join(f"{each:,}" for each in dict.fromkeys(numbers))


def start_lines(ready: "Ready", *, device: str) -> list[str]:
    """Return what starts: name, folder, size, steps and tokens in all and to go, layout, attention; a date first.

    Args:
        ready: The run, checked.
        device: Device type of the ranks: cpu or cuda.
    """
    config, train = ready.config, ready.config.train
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    parameters = parameter_count(config.model, vocab_size=ready.prepared.vocab_size)
    steps_left = train.steps - ready.start.step
    past_fall = min(steps_left, train.steps - schedule_steps(train)) if SCHEDULES[train.schedule].falls else 0
    least = f"; the last {past_fall:,} at train.min_learning_rate" if past_fall > 0 else ""
    in_all, left = tokens_in_all(config, start=ready.start), tokens_between(ready.start.step, train.steps, config)
    each = step_tokens(config, after=ready.start.step)  # those before may have had other sizes, of a branch's trunk
    ranks = counted(ready.layout.world_size, "CPU rank" if device == "cpu" else "GPU rank")
    return [
        f"{now}  {config.run.name} in {ready.run_dir}",
        f"{parameters:,} parameters; {train.steps:,} steps, {scaled(in_all)} tokens in all",
        f"to go: {counted(steps_left, 'step')}, {scaled(left)} tokens, {each} a step{least}",
        f"{ranks}: {ready.layout}, {train.precision}",
        f"attention {attention_here(config, device=device)}",
    ]


def build_line(backend: Backend, *, draws: bool) -> str:
    """Return what is said before the model is built, with initial weights or without."""
    compiled = f"; the attention kernel ({backend.name}) is compiled, which takes minutes" if backend.compiles else ""
    drawing = " drawing its weights," if draws else ""
    return f"building the model,{drawing} checking its positions{compiled}"


def verified_line(certificates: "Sequence[Certificate]", *, device: str) -> str:
    """Return what is said once all ranks have measured their attention.

    Args:
        certificates: What they measured.
        device: Name of the device.
    """
    first, ranks = certificates[0], counted(len(certificates), "rank")
    title = POSITIONS[first.position].title
    return f"{title} verified on {ranks}: attention {first.backend}, {first.precision}, {device}"


def step_line(result: StepResult, *, steps: int, speed: float, seconds_left: float, columns: int | None) -> str:
    """Return the line of a step.

    Args:
        result: The step.
        steps: Steps of the run.
        speed: Tokens per second of the steps since the last line.
        seconds_left: Time to the end of the run.
        columns: Width that it must fit; None for any.
    """
    utilization = result.model_flops_utilization or 0.0
    figures = [
        f"step {result.step}/{steps}",
        f"loss {result.loss:#.4g}",
        f"lr {result.learning_rate:.1e}".replace("e-0", "e-").replace("e+00", ""),
        f"grad {_three_digits(result.grad_norm)}",
        f"{scaled(speed)} tokens/s",
        byte_size(result.memory_gb * 1e9),
        *([f"MFU {utilization:.0%}"] if utilization >= 0.01 else []),
        f"{duration(seconds_left)} left",
    ]
    density = result.attention_density
    if density is not None and density < 0.995:  # only what windows leave out is worth a place
        figures.insert(4, f"scores {density:.0%}")
        return fitted(figures, spares=(4, 3), columns=columns)
    return fitted(figures, spares=(3,), columns=columns)


def live_line(
    result: StepResult, *, steps: int, speed: float, seconds_left: float, doing: str, columns: int | None
) -> str:
    """Return the line below the others that shows the newest step.

    Args:
        result: The step.
        steps: Steps of the run.
        speed: Tokens per second of the recent steps.
        seconds_left: Time to the end of the run.
        doing: What happens now, if it is not a step.
        columns: Width that it must fit; None for any.
    """
    figures = [
        f"step {result.step}/{steps}",
        f"{result.step / steps:.0%}",
        f"loss {result.loss:#.4g}",
        f"{scaled(speed)} tokens/s",
        f"{duration(seconds_left)} left",
        *([doing] if doing else []),
    ]
    # A terminal may go to the next line after its last column.
    return fitted(figures, spares=(3,), columns=None if columns is None else columns - 1)


def validation_lines(result: StepResult, *, loss: float, best: Best | None) -> list[str]:
    """Return the line of a validation, and one of each kind of further losses; `best` includes it."""
    step, seconds = result.step, result.validation_seconds or 0.0
    if best is None:
        compared = ""
    elif best.step == step:
        compared = ", the best so far"
    else:
        compared = f", best {best.loss:.4f} at step {best.step}"
    lines = [f"validation at step {step}: loss {loss:.4f}{compared} ({duration(seconds)})"]
    if result.validation_by_length:
        losses = (f"{each:.4f} at {length:,}" for length, each in result.validation_by_length.items())
        lines.append(f"loss by length: {', '.join(losses)} tokens")
    return lines + [f"loss of {source}: {each:.4f}" for source, each in result.validation_by_source.items()]


def save_line(save: Save, *, size_bytes: int) -> str:
    """Return the line of a saved checkpoint."""
    return f"saved step {save.step}: {save.folder} ({byte_size(size_bytes)} in {duration(save.seconds)})"


def closing_lines(*, steps: int, tokens: int, spent: Spent, memory_gb: float, best: Best | None) -> list[str]:
    """Return the summary of a start.

    Args:
        steps: Taken by this start, at least one.
        tokens: Tokens of these steps.
        spent: Its time.
        memory_gb: Peak of the rank with the largest.
        best: Best validation of all starts; None if there was none.
    """
    rest = spent.total - spent.training - spent.validation - spent.saving
    parts = [("training", spent.training), ("validation", spent.validation), ("saving", spent.saving), ("other", rest)]
    lines = [
        f"total {duration(spent.total)}: " + ", ".join(f"{name} {duration(max(0.0, each))}" for name, each in parts),
        f"{counted(steps, 'step')} at {scaled(tokens / spent.training)} tokens/s (training alone), "
        f"peak memory {byte_size(memory_gb * 1e9)}",
    ]
    return lines if best is None else [*lines, best_line(best)]


def best_line(best: Best) -> str:
    """Return the best validation of all starts."""
    return f"best validation: loss {best.loss:.4f} at step {best.step}"


def evaluate_line(run_dir: Path) -> str:
    """Return the command to type after the last step."""
    return f"next: trainshort evaluate {typed_path(run_dir)}"


def lost_lines(*, last_step: int, checkpoint: Path | None, saved_step: int) -> list[str]:
    """Return what a run has lost that was ended without saving.

    Args:
        last_step: The last step that it had finished.
        checkpoint: Its newest checkpoint, if there is one.
        saved_step: Step of that checkpoint, or 0.
    """
    if last_step <= saved_step:
        lost = "no finished step is lost"
    elif last_step == saved_step + 1:
        lost = f"step {last_step} is lost"
    else:
        lost = f"steps {saved_step + 1} to {last_step} are lost"
    if checkpoint is None:
        return [f"ended without saving: {lost}, there is no checkpoint"]
    return [f"ended without saving: {lost}", f"{checkpoint} stays"]


def fitted(figures: Sequence[str], *, spares: Sequence[int], columns: int | None) -> str:
    """Join figures into a line that fits: leave out some, then space between them, and at last what does not fit.

    Args:
        figures: The parts of the line, in order.
        spares: Indices of those to leave out, the first one first.
        columns: Width; None for any.
    """
    kept = [[each for place, each in enumerate(figures) if place not in spares[:out]] for out in range(len(spares) + 1)]
    narrow = " ".join(kept[-1])
    for line in (*map("  ".join, kept), narrow, narrow.replace("tokens/s", "tok/s")):
        if columns is None or len(line) <= columns:
            return line
    return line[:columns]


def _three_digits(number: float) -> str:
    return f"{number:#.3g}".rstrip(".")
