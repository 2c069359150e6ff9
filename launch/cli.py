"""The command line. Each command imports what it needs when it runs: a user waits for start-up every time."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from configs.errors import InputError, TrainshortError
from launch.jobs_commands import app as jobs_app
from training.versions import check_frozen

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
app.add_typer(jobs_app, name="jobs")

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
        check_frozen()
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
    from launch.show.run import run_summary, show_json, show_summary

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

    from data_pipeline.prepare import prepare_data
    from launch.show.run import show_prepared

    show_prepared(prepare_data(config.data, folder=data_folder(config), progress=True))


@app.command()
def train(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[
        str | None,
        typer.Option(metavar="N", help="Local ranks to start.  [default: this machine's GPUs, else tensor x pipeline]"),
    ] = None,
    accept_change: Annotated[
        bool, typer.Option("--accept-change", help="Resume also where model or data are not what they were.")
    ] = False,
) -> None:
    """Train, resuming from the newest checkpoint; starts local ranks, or joins those of srun and torchrun."""
    from parallel.start import find_process_rank, hold_stop_signals

    asked = _count(ranks, option="--ranks")
    config = _load(run, overrides)
    place = find_process_rank(os.environ)
    if place is None:
        options = ["--accept-change"] if accept_change else []
        raise SystemExit(_start_local(config, run=run, overrides=overrides or [], ranks=asked, options=options))
    if ranks is not None:
        raise InputError(
            f"--ranks {ranks} starts local ranks, but this is rank {place.rank} of {place.world_size} already: "
            f"leave --ranks out under {place.starter}"
        )

    hold_stop_signals()  # before what imports for seconds

    from training.run import train_rank

    train_rank(config, place, accept_change=accept_change)


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

    from launch.show.run import show_json, show_report
    from training.evaluation.run import evaluate_checkpoint

    report = evaluate_checkpoint(checkpoint, lengths=asked, protocols=tuple(protocol) if protocol else None, data=data)
    if as_json:
        show_json(report)
    else:
        show_report(report)


@app.command()
def generate(
    checkpoint: Where,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue; empty for the start of a document.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="That text in a file; - for standard input. Its last line break is dropped."),
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help="New tokens at most.")] = "64",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draws.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Continue a text, with a key-value cache; past the training length too."""
    count = _count(tokens, option="--tokens")
    assert count is not None

    from launch.show.run import show_generated
    from training.generation import Sampling, generate_from_checkpoint, read_prompt

    text = read_prompt(prompt, prompt_file)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    show_generated(generate_from_checkpoint(checkpoint, prompt=text, tokens=count, sampling=sampling), as_json=as_json)


@app.command()
def export(
    checkpoint: Where,
    form: Annotated[str, typer.Option("--format", metavar="hf", help="hf: transformers' BloomForCausalLM.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
) -> None:
    """Write the model for inference engines; logits are compared before it says done."""
    from launch.show.run import show_lines
    from training.export.run import export_checkpoint

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
    from launch.show.run import show_lines
    from launch.slurm.script import fewest_nodes, program_of, render

    asked = _count(nodes, option="--nodes")
    config = _load(run, overrides)
    run_dir = check_run_folder(config)
    node_count = asked or fewest_nodes(config)
    if submit:
        from launch.show.jobs import show_submitted
        from launch.slurm.submit import submit_run

        show_submitted(submit_run(config, nodes=node_count, folder=Path.cwd()), run_dir=run_dir)
        return
    scripts = render(
        config,
        run_file=run,
        nodes=node_count,
        overrides=overrides or [],
        folder=Path.cwd(),
        program=program_of(config),
    )
    needs = f"its log needs the folder {logs_folder(run_dir)}; --submit makes it"
    for name, script in scripts.items():
        show_lines(f"# ----- {name}.sbatch ({needs}) -----", script.rstrip(), "")


@app.command()
def doctor(
    alibi: Annotated[
        str | None, typer.Option(metavar="RUN.yaml", help="Audit how exact this run's ALiBi is here, at its lengths.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine can do; with --alibi, measure a run's attention against exact ALiBi."""
    if overrides and alibi is None:
        raise InputError(f"--set {overrides[0]} changes a run file, and none is given: add --alibi RUN.yaml")
    config = None if alibi is None else _load(alibi, overrides)

    from launch.doctor import alibi_report, check_audit, machine_report
    from launch.show.machine import show_audit, show_machine
    from launch.show.run import show_json

    found = machine_report() if config is None else alibi_report(config)
    if as_json:
        show_json(found)
    elif config is None:
        show_machine(found)
    else:
        show_audit(found)
    if config is not None:
        check_audit(found)


@checkpoint_app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder, or a checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run, oldest first; their bytes are not read."""
    from launch.show.run import show_checkpoints, show_json
    from training.checkpoint.verify import list_verdicts

    found = list_verdicts(folder)
    if as_json:
        show_json([verdict.to_json() for verdict in found])
    else:
        show_checkpoints(found, folder=folder)


@checkpoint_app.command()
def verify(checkpoint: Where, as_json: AsJson = False) -> None:
    """Read every byte of a checkpoint, or of each one of a run folder; exit 2 where one is not whole."""
    from launch.show.run import show_json, show_verdicts
    from training.checkpoint.verify import verify_checkpoints

    found = verify_checkpoints(checkpoint)
    if as_json:
        show_json([verdict.to_json() for verdict in found])
    else:
        show_verdicts(found)
    if any(verdict.problems for verdict in found):
        raise SystemExit(InputError.exit_code)


@checkpoint_app.command()
def reshape(
    checkpoint: Where,
    overrides: Overrides = None,
    ranks: Annotated[str | None, typer.Option(metavar="N", help="Ranks in all.  [default: tensor x pipeline]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show how each tensor would be cut.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what another layout does to a checkpoint. None has to be converted: any layout resumes from it as it is."""
    from launch.show.run import show_json, show_lines, show_reshape

    asked = _count(ranks, option="--ranks")
    if not dry_run:
        show_lines(
            "nothing has to be done: a run resumes from any checkpoint in any layout; start it there, as in "
            "`trainshort train RUN.yaml --set parallel.tensor=4`, or see what is read with --dry-run"
        )
        return

    from training.checkpoint.reshape import plan_reshape

    plan = plan_reshape(checkpoint, overrides=overrides or [], ranks=asked)
    if as_json:
        show_json(plan.to_json())
    else:
        show_reshape(plan)


def _load(run: str, overrides: list[str] | None) -> "RunConfig":
    from configs.load import load_run

    return load_run(run, overrides=overrides or [])


def _start_local(config: "RunConfig", *, run: str, overrides: list[str], ranks: int | None, options: list[str]) -> int:
    """Refuse what can be refused before any process starts, then start the ranks."""
    from configs.paths import logs_folder
    from launch.local import start_ranks
    from launch.machine import gpu_count
    from launch.show.run import show_lines
    from training.incarnation import refuse_second_start, sole_launcher
    from training.preflight import make_ready

    gpus = gpu_count(os.environ)
    ranks = ranks or gpus or config.parallel.tensor * config.parallel.pipeline
    if 0 < gpus < ranks:
        raise InputError(
            f"--ranks {ranks} is more than this machine's GPUs ({gpus}): start {gpus} or fewer, "
            'or set CUDA_VISIBLE_DEVICES="" for CPU ranks'
        )
    ready = make_ready(config, world_size=ranks, device="cuda" if gpus else "cpu")
    if ready.finished:
        show_lines(f"{ready.run_dir} is trained to its last step, {config.train.steps}: raise train.steps to go on")
        return 0
    refuse_second_start(ready.run_dir)
    sets = [argument for override in overrides for argument in ("--set", override)]
    # -P: a folder of the user's that is called training or configs is not ours.
    command = [sys.executable, "-P", "-m", "trainshort", "train", *options, *sets, "--", run]
    with sole_launcher(ready.run_dir):
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
