"""What a page shows of each run, gathered from the files of its folder. Imports no torch."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.positions import POSITIONS
from configs.saved import typed_run
from configs.secrets import hide_secrets
from training.comparison.comparison import Comparison
from training.comparison.run import ComparedRun
from training.page.chart import Chart
from training.page.curves import bias_chart
from training.page.facts import (
    CertificateFacts,
    LayoutFacts,
    certificate_facts,
    environment_rows,
    head_rows,
    layout_facts,
    read_environment,
    version_rows,
)
from training.page.starts import RunStart, read_starts
from training.page.timeline import Timeline, cost_rows, draw_timeline
from training.rollbacks import Rollback, read_rollbacks


@dataclass(frozen=True)
class RunDetails:
    """One run of a page.

    Attributes:
        number: Its place in the comparison, which selects its colour.
        label: Its label there.
        path: The run folder or checkpoint, as given.
        starts: Its starts.
        timeline: None before the first start.
        cost: Names and values; empty before the first step.
        certificate: The newest start's; None before the first start.
        layout: Which rank holds what; None if that is not known.
        bias: The bias of each head; None for positions without slopes.
        heads: A row per head.
        positions: What to say of positions without slopes.
        environment, versions: Names and values; empty before the first start.
        train_command: What trains it.
        evaluate_command: What evaluates it; None if it was evaluated.
        has_checkpoint: Whether there is something to evaluate.
    """

    number: int
    label: str
    path: Path
    starts: tuple[RunStart, ...]
    timeline: Timeline | None
    cost: list[tuple[str, str]]
    certificate: CertificateFacts | None
    layout: LayoutFacts | None
    bias: Chart | None
    heads: list[tuple[str, ...]]
    positions: str
    environment: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    train_command: str
    evaluate_command: str | None
    has_checkpoint: bool


def read_details(comparison: Comparison) -> list[RunDetails]:
    """Return what the folders of the runs show of each."""
    return [_read(number, run) for number, run in enumerate(comparison.runs)]


def _read(number: int, run: ComparedRun) -> RunDetails:
    config, starts = run.config, read_starts(run.run_dir, run.steps)
    environment = read_environment(run.run_dir)
    stated = [start for start in starts if start.certificate]
    # a start of a run that was done took no step, maybe on fewer ranks
    at_work = [start for start in stated if start.steps or start.lost or start.refused is not None]
    newest = (at_work or stated)[-1].certificate if stated else None
    vocab_size = run.manifest.vocab_size if run.manifest else config.data.vocab_size
    took_steps = any(start.steps or start.lost for start in starts)
    row = POSITIONS[config.model.position]
    bias = "has a bias without slopes" if row.has_bias else "adds no bias to the scores"
    about = "has a bias that is learned" if row.entries_per_head else bias
    device = environment.get("device")
    return RunDetails(
        number=number,
        label=run.label,
        path=run.path,
        starts=starts,
        timeline=draw_timeline(starts, run_dir=run.run_dir) if starts else None,
        cost=_cost(run.run_dir, starts, device=device) if took_steps else [],
        certificate=None if newest is None else certificate_facts(newest),
        layout=None if newest is None else layout_facts(newest, config=config, vocab_size=vocab_size),
        bias=bias_chart(config.model, trained=run.train_length),
        heads=head_rows(config, certificate=newest),
        positions=f"model.position is {config.model.position}, which {about}.",
        environment=environment_rows(environment, run_dir=run.run_dir),
        versions=version_rows(environment),
        train_command=f"trainshort train {typed_run(run.run_dir)}",
        evaluate_command=None if run.report else run.evaluate_command,
        has_checkpoint=run.checkpoint is not None,
    )


def _cost(run_dir: Path, starts: Sequence[RunStart], *, device: object) -> list[tuple[str, str]]:
    rollbacks: list[Rollback] = []
    with suppress(InputError):  # a damaged record: the page shows the rest
        rollbacks = read_rollbacks(run_dir)
    return cost_rows(starts, device=None if device is None else hide_secrets(str(device)), rollbacks=rollbacks)
