"""The command line. Each command imports what it needs when it runs: a user waits for start-up every time."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from configs.errors import InputError, TrainshortError

if TYPE_CHECKING:
    from configs.schema import RunConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train decoder language models short, test them long.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoint_app = typer.Typer(no_args_is_help=True, help="What a run has saved.")
app.add_typer(checkpoint_app, name="checkpoint")

RunFile = Annotated[str, typer.Argument(metavar="RUN.yaml", help="A run file, or the name of a shipped run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="section.key=value", help="Override one key; may be repeated, the last one wins."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Where = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run folder for its newest one.")]


# What typer raises for a wrong command line. Its name is not typer's to give: some versions bring their own click.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
STOPPED_BY_HAND = 130


def main() -> None:
    """Run the command line; what a user can mend ends in one message and its exit code."""
    try:
        code = app(standalone_mode=False, prog_name="trainshort")
    except TrainshortError as error:
        code = _fail(str(error), code=error.exit_code)
    except typer.Abort:
        code = STOPPED_BY_HAND
    except UsageError as error:
        code = _fail(_usage(error), code=InputError.exit_code)
    raise SystemExit(code)


@app.command()
def check(run: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Validate what a run file says, all problems at once."""
    from launch.show import run_summary, show_json, show_summary

    config = _load(run, overrides)
    if as_json:
        show_json(run_summary(config))
    else:
        show_summary(config)


@app.command()
def prepare(run: RunFile, overrides: Overrides = None) -> None:
    """Turn the sources into a tokenizer and training data; done parts are not done again."""
    from configs.paths import check_run_folder, data_folder

    config = _load(run, overrides)
    check_run_folder(config)

    from data_pipeline.prepare import prepare as prepare_data
    from launch.show import show_prepared

    show_prepared(prepare_data(config.data, folder=data_folder(config), progress=True))


@app.command()
def train(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[
        str | None,
        typer.Option(metavar="N", help="Local ranks to start.  [default: this machine's GPUs, else tensor x pipeline]"),
    ] = None,
) -> None:
    """Train, resuming from the newest checkpoint; starts local ranks, or joins those of srun and torchrun."""
    from parallel.start import find_place

    asked = _count(ranks, option="--ranks")
    config = _load(run, overrides)
    place = find_place(os.environ)
    if place is None:
        raise SystemExit(_start_local(config, run=run, overrides=overrides or [], ranks=asked))
    if ranks is not None:
        raise InputError(
            f"--ranks {ranks} starts local ranks, but this is rank {place.rank} of {place.size} already: "
            f"leave --ranks out under {place.starter}"
        )

    from training.run import train as train_rank

    train_rank(config, place)


@app.command()
def evaluate(
    checkpoint: Where,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,...", help="Lengths in tokens.  [default: the run file's, else 1, 2, 4, 8 x trained]"
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="nonoverlapping or sliding:STRIDE; may be repeated.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A text file.  [default: the run's held-out text]")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity at each length; writes the run's evaluation folder."""
    asked = _lengths(lengths)

    from launch.show import show_json, show_report
    from training.evaluation.run import evaluate as evaluate_checkpoint

    report = evaluate_checkpoint(checkpoint, lengths=asked, protocols=tuple(protocol) if protocol else None, data=data)
    if as_json:
        show_json(report)
    else:
        show_report(report)


@app.command()
def export(
    checkpoint: Where,
    form: Annotated[str, typer.Option("--format", metavar="hf", help="hf: transformers' BloomForCausalLM.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
) -> None:
    """Write the model for inference engines; logits are compared before it says done."""
    from launch.show import show_lines
    from training.export.run import export as export_checkpoint

    show_lines(f"exported {export_checkpoint(checkpoint, format=form, out=out)}")


@app.command()
def slurm(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[
        str | None, typer.Option(metavar="N", help="Nodes to train on.  [default: the fewest that the layout fits]")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the scripts instead of printing them.")] = False,
) -> None:
    """Write sbatch scripts that train, then evaluate, then export."""
    from configs.paths import check_run_folder, logs_folder
    from launch.show import show_lines
    from launch.slurm import fewest_nodes, program_of, render
    from launch.slurm import submit as submit_chain

    asked = _count(nodes, option="--nodes")
    config = _load(run, overrides)
    scripts = render(
        config,
        run_file=run,
        nodes=asked or fewest_nodes(config),
        overrides=overrides or [],
        folder=Path.cwd(),
        program=program_of(config),
    )
    logs = logs_folder(check_run_folder(config))
    if submit:
        jobs = submit_chain(scripts, config=config)
        show_lines(*(f"submitted {name}: job {job}" for name, job in jobs.items()), f"logs: {logs}")
        return
    for name, script in scripts.items():
        show_lines(
            f"# ----- {name}.sbatch (its log needs the folder {logs}; --submit makes it) -----", script.rstrip(), ""
        )


@checkpoint_app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")], as_json: AsJson = False
) -> None:
    """List the checkpoints of a run, oldest first."""
    from launch.show import show_checkpoints, show_json
    from training.checkpoint.manifest import list_checkpoints

    if not folder.is_dir():
        raise InputError(f"run folder {folder} does not exist: give the run.dir of a run")
    found = list_checkpoints(folder)
    if as_json:
        show_json([{"step": checkpoint.step, "path": str(checkpoint.path)} for checkpoint in found])
    else:
        show_checkpoints(found, folder=folder)


def _load(run: str, overrides: list[str] | None) -> "RunConfig":
    from configs.load import load_run

    return load_run(run, overrides=overrides or [])


def _start_local(config: "RunConfig", *, run: str, overrides: list[str], ranks: int | None) -> int:
    """Refuse what can be refused before any process starts, then start the ranks."""
    from configs.paths import logs_folder
    from launch.local import start_ranks
    from launch.machine import gpu_count
    from launch.show import show_lines
    from training.preflight import make_ready

    gpus = gpu_count(os.environ)
    ranks = ranks or gpus or config.parallel.tensor * config.parallel.pipeline
    if 0 < gpus < ranks:
        raise InputError(
            f"--ranks {ranks} is more than this machine's GPUs ({gpus}): start {gpus} or fewer, "
            'or set CUDA_VISIBLE_DEVICES="" for CPU ranks'
        )
    ready = make_ready(config, world_size=ranks)
    if ready.finished:
        show_lines(f"{ready.run_dir} is trained to its last step, {config.train.steps}: raise train.steps to go on")
        return 0
    sets = [argument for override in overrides for argument in ("--set", override)]
    # -P: a folder of the user's that is called training or configs is not ours.
    command = [sys.executable, "-P", "-m", "trainshort", "train", *sets, "--", run]
    return start_ranks(command, ranks=ranks, logs=logs_folder(ready.run_dir), environment=os.environ)


def _fail(message: str, *, code: int) -> int:
    """Write an error, and an empty one not: what typer says itself, the help of a lone `trainshort`, comes so."""
    sys.stdout.flush()
    if message:
        sys.stderr.write(f"error: {message}\n")
    return code


def _usage(error: Any) -> str:
    """Return a wrong command line's message in one line, with what to do."""
    message = " ".join(str(error.format_message()).split()).rstrip(".?")
    command = error.ctx.command_path if error.ctx else "trainshort"
    return f"{message[0].lower()}{message[1:]}: see `{command} --help`" if message else ""


def _count(text: str | None, *, option: str) -> int | None:
    if text is None:
        return None
    if not (re.fullmatch(r"[0-9]{1,9}", text) and int(text)):
        raise InputError(f"{option} must be a whole number from 1, got {text!r}: write {option} 4")
    return int(text)


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) > 1 for part in parts):
        raise InputError(f"--lengths must be whole numbers from 2 with commas between, got {text!r}: write 1024,2048")
    return tuple(int(part) for part in parts)
