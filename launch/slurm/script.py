"""sbatch scripts of a run: train, then evaluate, then export."""

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.paths import checkpoints_folder, data_folder, export_folder, logs_folder, run_folder
from configs.schema import RunConfig, Slurm
from parallel.layout import Layout
from training.checkpoint.manifest import step_folder

CHAIN = ("train", "evaluate", "export")
STOPPED = 130  # how a training job ends that was asked to stop; the template tells why


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
    code: Path | None = None,
    image: str | None = None,
) -> dict[str, str]:
    """Return the scripts by name, in the order of the chain.

    Args:
        config: The run, overrides applied.
        run_file: What the training job runs.
        nodes: Nodes of the training job.
        overrides: The user's `--set` values, carried along.
        folder: Where the scripts start, so that relative paths mean what they mean here.
        program: How the nodes call trainshort.
        code: A frozen copy of the code to run; what is installed otherwise.
        image: Size and time of the container's image, which must not change; None where that does not matter.
    Raises:
        InputError: the ranks do not fit the layout.
    """
    ranks = ranks_per_node(config, nodes=nodes)
    layout = Layout.of(config, world_size=nodes * ranks)
    template = _template()
    sets = [word for override in overrides for word in ("--set", override)]
    # A step of one task joins nothing: `train` starts its local ranks, by default one a GPU.
    alone = ["--ranks", "1"] if layout.world_size == 1 and config.slurm.starter == "srun" else []
    commands = {"train": [program, "train", run_file, *sets, *alone], **_after_training(config, program=program)}
    names = {**_names(config, folder=folder), **_container(config, folder=folder)}
    return {
        name: template.render(
            name=name,
            job_name=job_name(config.run.name, name),
            what=f"{layout.world_size} ranks, {layout}" if name == "train" else f"{name} the last step's checkpoint",
            nodes=nodes if name == "train" else 1,
            ranks=ranks,
            command=shlex.join(commands[name]),
            torchrun=program.removesuffix("trainshort") + "torchrun",
            code=str(code) if code else None,
            image=image,
            **_sizes(config.slurm, ranks=ranks if name == "train" else None),
            **names,
        )
        for name in CHAIN
    }


def option_value(value: str) -> str:
    """Return a value as an #SBATCH line takes it: bare where it can be, else in double quotes.

    sbatch reads quotes and backslashes much as the shell does, but expands nothing.
    """
    if re.fullmatch(r"[\w@%+=:,./\[\]&|*-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def program_of(config: RunConfig) -> str:
    """Return how the nodes call trainshort: by its path here, which no module or profile changes.

    In a container, whose paths are others, by its name.
    """
    here = Path(sys.executable).with_name("trainshort")
    found = str(here) if here.exists() else shutil.which("trainshort")
    return os.path.abspath(found) if found and not config.slurm.container else "trainshort"


def job_name(run: str, name: str) -> str:
    """Return the name in SLURM of one of a run's jobs."""
    return f"{run}-{name}"


def image_state(config: RunConfig) -> str | None:
    """Return size and time of the container's image, as `stat` has them; None where it is no file here."""
    image = Path(config.slurm.container or "")
    if not image.is_file():
        return None
    state = image.stat()
    return f"{state.st_size} {int(state.st_mtime)}"


def _names(config: RunConfig, *, folder: Path) -> dict[str, Any]:
    """Return what the scripts read of the run, and what they call it and what it leaves."""
    run_dir = run_folder(config)
    return {
        "slurm": config.slurm,
        "run": config.run.name,
        "run_dir": str(run_dir),
        "folder": str(folder),
        "logs": _escape(folder / logs_folder(run_dir)),
        "last": _last(config).name,
        "export": str(export_folder(run_dir, form="hf")),
        "stopped": STOPPED,
    }


def _after_training(config: RunConfig, *, program: str) -> dict[str, list[str]]:
    # By its name: where it is broken, the one before it is not the trained model.
    last = str(_last(config))
    lengths = ",".join(map(str, config.evaluation_lengths))
    protocols = [word for protocol in config.evaluate.protocols for word in ("--protocol", protocol)]
    out = str(export_folder(run_folder(config), form="hf"))
    return {
        "evaluate": [program, "evaluate", last, "--lengths", lengths, *protocols],
        "export": [program, "export", last, "--format", "hf", "--out", out],
    }


def _last(config: RunConfig) -> Path:
    return step_folder(checkpoints_folder(run_folder(config)), step=config.train.steps)


def _template() -> Any:
    templates = Environment(
        loader=PackageLoader("launch"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["quote"] = shlex.quote
    templates.filters["option"] = option_value
    return templates.get_template("job.sbatch.j2")


def _sizes(slurm: Slurm, *, ranks: int | None) -> dict[str, int | None]:
    """Return what a job asks of each node, srun tasks, their CPUs, GPUs; None for the one process of an evaluation."""
    if ranks is None:
        return {"tasks": 1, "cpus_per_task": slurm.cpus_per_rank, "gpus": min(1, slurm.gpus_per_node)}
    if slurm.starter == "torchrun":  # one task has all ranks of a node
        return {"tasks": 1, "cpus_per_task": ranks * (slurm.cpus_per_rank or 1), "gpus": slurm.gpus_per_node}
    return {"tasks": ranks, "cpus_per_task": slurm.cpus_per_rank, "gpus": slurm.gpus_per_node}


def _container(config: RunConfig, *, folder: Path) -> dict[str, str]:
    """Return the options of srun and the words before a command that put it into the container."""
    slurm = config.slurm
    if slurm.container is None:
        return {"srun_options": "", "prefix": ""}
    source = [Path(config.train.init_from)] if config.train.init_from else []
    # Without the dots of ../data: else that seems to lie in the folder.
    named = [Path(os.path.normpath(folder / path)) for path in (run_folder(config), data_folder(config), *source)]
    inside = [folder, *(path for path in named if not path.is_relative_to(folder))]
    mounts = list(dict.fromkeys([*map(str, inside), *slurm.mounts]))
    if slurm.container_kind == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if slurm.gpus_per_node else []), "--pwd", str(folder)]
        words += [word for mount in mounts for word in ("--bind", mount)] + [slurm.container]
        return {"srun_options": "", "prefix": shlex.join(words) + " "}
    pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    options = [f"--container-image={slurm.container}", f"--container-mounts={pairs}", f"--container-workdir={folder}"]
    return {"srun_options": "".join(f" \\\n  {shlex.quote(option)}" for option in options), "prefix": ""}


def _escape(path: Path) -> str:
    """Return a path as SLURM's log patterns take it: %% stands for a %."""
    return str(path).replace("%", "%%")
