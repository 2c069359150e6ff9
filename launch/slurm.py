"""sbatch scripts of a run: train, then evaluate, then export, chained by dependency."""

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.errors import MachineError
from configs.paths import export_folder, logs_folder, run_folder, slurm_folder
from configs.schema import RunConfig
from parallel.layout import Layout

CHAIN = ("train", "evaluate", "export")


def ranks_per_node(config: RunConfig, *, nodes: int) -> int:
    """Return the ranks of a node: as set, else one a GPU, else the fewest CPU ranks that make whole model copies."""
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    fewest = model_ranks // math.gcd(model_ranks, nodes)
    return config.slurm.ranks_per_node or config.slurm.gpus_per_node or fewest


def fewest_nodes(config: RunConfig) -> int:
    """Return the smallest number of nodes whose ranks make whole copies of the model."""
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    return model_ranks // math.gcd(model_ranks, ranks_per_node(config, nodes=1))


def render(
    config: RunConfig,
    *,
    run_file: str,
    nodes: int,
    overrides: Sequence[str] = (),
    folder: Path,
    program: str = "trainshort",
) -> dict[str, str]:
    """Return the scripts by name, in the order of the chain.

    Args:
        config: The run, overrides applied.
        run_file: What the user called it; the script says the same.
        nodes: Nodes of the training job.
        overrides: The user's `--set` values, carried along.
        folder: Where the scripts start, so that relative paths mean what they mean here.
        program: How the nodes call trainshort.
    Raises:
        InputError: the ranks do not fit the layout.
    """
    ranks = ranks_per_node(config, nodes=nodes)
    layout = Layout.of(config, world_size=nodes * ranks)
    run_dir = run_folder(config)
    sets = [argument for override in overrides for argument in ("--set", override)]
    export = export_folder(run_dir, form="hf")
    commands = {
        "train": [program, "train", run_file, *sets],
        "evaluate": [program, "evaluate", str(run_dir)],
        "export": [program, "export", str(run_dir), "--format", "hf", "--out", str(export)],
    }
    templates = _templates()
    return {
        name: templates.get_template("train.sbatch.j2" if name == "train" else "after.sbatch.j2").render(
            name=name,
            run=config.run.name,
            slurm=config.slurm,
            layout=layout,
            nodes=nodes if name == "train" else 1,
            ranks=ranks if name == "train" else 1,
            gpus=config.slurm.gpus_per_node if name == "train" else min(1, config.slurm.gpus_per_node),
            folder=str(folder),
            log=log_pattern(folder / logs_folder(run_dir), name=name),
            command=shlex.join(commands[name]),
        )
        + "\n"
        for name in CHAIN
    }


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("launch"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["quote"] = shlex.quote
    templates.filters["option"] = option_value
    return templates


def option_value(value: str) -> str:
    """Return a value as an #SBATCH line takes it: bare where it can be, else in double quotes.

    sbatch reads quotes and backslashes much as the shell does, but expands nothing.
    """
    if re.fullmatch(r"[\w@%+=:,./\[\]&|*-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def log_pattern(logs: Path, *, name: str) -> str:
    """Return the log file of a job; sbatch puts its number for %j, and %% stands for a % of the path."""
    return f"{str(logs).replace('%', '%%')}/slurm-{name}-%j.log"


def submit(scripts: dict[str, str], *, config: RunConfig) -> dict[str, str]:
    """Write the scripts to RUN_DIR/slurm, submit them as a chain, and return the job numbers by name.

    Raises:
        MachineError: there is no sbatch here, or it refuses a script.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise MachineError("sbatch is not on this machine: run this on a SLURM login node, or leave out --submit")
    folder = slurm_folder(run_folder(config))
    for needed in (folder, logs_folder(run_folder(config))):
        needed.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    for name, script in scripts.items():
        path = folder / f"{name}.sbatch"
        path.write_text(script, encoding="utf-8")
        # Without kill-on-invalid-dep a chain whose first job failed would wait for ever.
        after = [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        done = subprocess.run([sbatch, "--parsable", *after, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            earlier = f" (submitted before it: {', '.join(jobs.values())})" if jobs else ""
            raise MachineError(f"sbatch refused {path}{earlier}: {why}: mend the slurm section and submit again")
        jobs[name] = done.stdout.strip().split(";")[0]
    return jobs


def program_of(config: RunConfig) -> str:
    """Return how the nodes call trainshort: by its name where that finds this one, else by its path here."""
    here = Path(sys.executable).with_name("trainshort")
    on_path = shutil.which("trainshort")
    if config.slurm.container or not here.exists() or (on_path and Path(on_path).resolve() == here.resolve()):
        return "trainshort"
    return str(here)
