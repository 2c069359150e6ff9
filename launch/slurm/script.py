"""Render the sbatch scripts of a run: train, then evaluate, then export."""

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.commands import override_options, path_argument
from configs.errors import InputError
from configs.paths import checkpoints_folder, data_folder, export_folder, logs_folder, run_folder
from configs.schema import RunConfig, Slurm
from configs.secrets import HIDDEN, hide_secrets, is_secret_name, public_variables, without_password
from parallel.layout import Layout
from training.checkpoint.manifest import list_checkpoints, step_folder
from training.evaluation.request import options_of_run
from training.export.formats.table import CHAIN_FORMAT, chain_export_options
from training.tracking.store import STORE_VARIABLE

CHAIN_JOBS = ("train", "evaluate", "export")
# Exit code of a training job that was asked to stop. Not 0: the next job of the chain must not start.
STOPPED_EXIT_CODE = 130


@dataclass(frozen=True)
class JobSize:
    """What a job asks for.

    Attributes:
        nodes: Nodes.
        ranks: Processes on each node.
        gpus: GPUs of each node.
    """

    nodes: int
    ranks: int
    gpus: int

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.ranks


def ranks_per_node(config: RunConfig, *, nodes: int) -> int:
    """Return the ranks per node: as set, else one per GPU, else the fewest CPU ranks that hold whole model copies."""
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    # nodes x fewest is the least common multiple of nodes and model_ranks.
    fewest = model_ranks // math.gcd(model_ranks, nodes)
    return config.slurm.ranks_per_node or config.slurm.gpus_per_node or fewest


def fewest_nodes(config: RunConfig) -> int:
    """Return the smallest number of nodes whose ranks hold whole copies of the model."""
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    return model_ranks // math.gcd(model_ranks, ranks_per_node(config, nodes=1))


def evaluation_size(config: RunConfig) -> JobSize:
    """Return what the evaluation's ranks need: as few nodes as hold them, and the tensor ranks of a stage on one node.

    All nodes have the same number of ranks, since SLURM and torchrun start as many on each.
    """
    slurm, tensor = config.slurm, config.evaluate.tensor
    ranks = tensor * config.evaluate.pipeline
    most = slurm.ranks_per_node or slurm.gpus_per_node or ranks
    fitting = [each for each in range(1, min(most, ranks) + 1) if ranks % each == 0]
    each = max((each for each in fitting if each % tensor == 0), default=fitting[-1])
    return JobSize(nodes=ranks // each, ranks=each, gpus=min(each, slurm.gpus_per_node))


def render_scripts(
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
    """Return the scripts by job name, in the order of the chain.

    Args:
        config: The run, overrides applied.
        run_file: Run file of the training job.
        nodes: Nodes of the training job.
        overrides: The user's `--set` values for the training job.
        folder: Working directory of the scripts; relative paths start there.
        program: Command that runs trainshort on the nodes.
        code: A frozen copy of the code to run, or None for the installed code.
        image: Result of `image_state`, which the scripts check when they start; None for no check.
    Raises:
        InputError: the ranks do not fit the layout, or a line holds a secret.
    """
    slurm, sizes = config.slurm, _job_sizes(config, nodes=nodes)
    layout = Layout.of(config, world_size=sizes["train"].world_size)
    template = _template()
    sets = override_options(public_overrides(overrides))
    # `train` does not join an srun step of one task, but starts local ranks, by default one per GPU.
    single = ["--ranks", "1"] if layout.world_size == 1 and slurm.starter == "srun" else []
    train = [program, "train", path_argument(run_file), *sets, *single]
    commands = {"train": train, **_after_training(config, program=program)}
    names = {**_names(config, folder=folder), **_container(config, folder=folder)}
    return {
        name: template.render(
            name=name,
            job_name=job_name(config.run.name, name),
            summary=_summary(name, config, layout),
            **_request(slurm, sizes[name], has_ranks=name == "train" or sizes[name].world_size > 1),
            command=shlex.join(commands[name]),
            torchrun=program.removesuffix("trainshort") + "torchrun",  # installed in the same folder
            code=str(code) if code else None,
            image=image,
            **names,
        )
        for name in CHAIN_JOBS
    }


def with_tracking_secret(config: RunConfig) -> RunConfig:
    """Return the run with the password of `track.uri` as a variable of its jobs, whose run file does not hold it."""
    uri, env = config.track.uri, config.slurm.env
    if uri is None or uri == without_password(uri) or STORE_VARIABLE in env:
        return config
    slurm = config.slurm.model_copy(update={"env": {**env, STORE_VARIABLE: uri}})
    return config.model_copy(update={"slurm": slurm})


def _refuse_secrets(slurm: Slurm) -> None:
    """Refuse lines that would write a secret into the scripts.

    Raises:
        InputError: names the line, without the secret.
    """
    for key in ("setup", "extra"):
        for line in getattr(slurm, key):
            if hide_secrets(line) != line:
                raise InputError(
                    f"slurm.{key} contains a secret, {hide_secrets(line)!r}, which the scripts would show: set it in "
                    "slurm.env, whose secrets reach the jobs through the environment of sbatch"
                )


def public_overrides(overrides: Sequence[str]) -> Iterator[str]:
    """Yield overrides without secrets, which reach the jobs through the environment."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "track.uri":
            yield f"{key}={without_password(value)}"
        elif not key.startswith("slurm.env") or (hide_secrets(override) == override and not is_secret_name(key)):
            yield override


def option_value(value: str) -> str:
    """Return a value for an #SBATCH line, in double quotes if it needs them.

    sbatch reads quotes and backslashes like a shell, but expands nothing.
    """
    if re.fullmatch(r"[\w@%+=:,./\[\]&|*-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def find_program(config: RunConfig) -> str:
    """Return the command that runs trainshort on the nodes.

    It is the absolute path of this installation, which no module or profile on the nodes can change. A container has
    its own paths: there it is the bare name.
    """
    if config.slurm.container:
        return "trainshort"
    beside_python = Path(sys.executable).with_name("trainshort")
    program = str(beside_python) if beside_python.exists() else shutil.which("trainshort")
    return os.path.abspath(program) if program else "trainshort"


def job_name(run: str, name: str) -> str:
    """Return the SLURM name of one of a run's jobs."""
    return f"{run}-{name}"


def image_state(config: RunConfig) -> str | None:
    """Return size and modification time of the container's image as `stat -c '%s %Y'` prints them.

    None if the image is not a file on this machine, such as an address in a registry.
    """
    image = Path(config.slurm.container or "")
    if not image.is_file():
        return None
    state = image.stat()
    return f"{state.st_size} {int(state.st_mtime)}"


def _names(config: RunConfig, *, folder: Path) -> dict[str, Any]:
    """Return the run's names, paths and variables for the template."""
    _refuse_secrets(config.slurm)
    run_dir = run_folder(config)
    return {
        "slurm": config.slurm,
        "env": public_variables(with_tracking_secret(config).slurm.env),
        "hidden": HIDDEN,
        "run": config.run.name,
        "run_dir": path_argument(run_dir),
        "folder": str(folder),
        "logs": _escape(folder / logs_folder(run_dir)),
        "last": _last_checkpoint(config).name,
        "export": path_argument(export_folder(run_dir, form=CHAIN_FORMAT)),
        "stopped": STOPPED_EXIT_CODE,
        "hook": config.track.hook,
    }


def _after_training(config: RunConfig, *, program: str) -> dict[str, list[str]]:
    """Return the commands of the evaluation and the export."""
    # They name the last step's checkpoint, not the run folder: if it is broken, an older one is not the trained model.
    last = path_argument(_last_checkpoint(config))
    out = path_argument(export_folder(run_folder(config), form=CHAIN_FORMAT))
    # One process: a model that is evaluated on several GPUs is too large for one, but not for the node.
    is_split = config.evaluate.tensor * config.evaluate.pipeline > 1
    on_cpu = ["env", "CUDA_VISIBLE_DEVICES="] if is_split else []
    return {
        "evaluate": [program, "evaluate", last, *options_of_run(config)],
        "export": [*on_cpu, program, "export", last, *chain_export_options(config.model), "--out", out],
    }


def _last_checkpoint(config: RunConfig) -> Path:
    return step_folder(checkpoints_folder(run_folder(config)), step=config.train.steps)


def _template() -> Any:
    # StrictUndefined: a misspelled name in the template is an error, not an empty string.
    templates = Environment(
        loader=PackageLoader("launch"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["quote"] = shlex.quote
    templates.filters["option"] = option_value
    return templates.get_template("job.sbatch.j2")


def _job_sizes(config: RunConfig, *, nodes: int) -> dict[str, JobSize]:
    gpus = config.slurm.gpus_per_node
    return {
        "train": JobSize(nodes, ranks_per_node(config, nodes=nodes), gpus),
        "evaluate": evaluation_size(config),
        "export": JobSize(1, 1, min(1, gpus)),  # also where it computes on CPUs: partitions may demand a GPU
    }


def _summary(name: str, config: RunConfig, layout: Layout) -> str:
    """Return what a job does, in the words of its script."""
    if name == "train":
        return f"{layout.world_size} ranks, {layout}"
    tensor, pipeline = config.evaluate.tensor, config.evaluate.pipeline
    ranks = f" on {tensor * pipeline} ranks, tensor {tensor} x pipeline {pipeline}"
    return f"{name} the last step's checkpoint{ranks if name == 'evaluate' and tensor * pipeline > 1 else ''}"


def _request(slurm: Slurm, size: JobSize, *, has_ranks: bool) -> dict[str, Any]:
    """Return the nodes, tasks, CPUs per task and GPUs that a job requests, for the template.

    Args:
        slurm: The run's section.
        size: What the job asks for.
        has_ranks: Whether its processes are ranks, which meet, and not one process alone.
    """
    tasks, cpus = size.ranks, slurm.cpus_per_rank
    if has_ranks and slurm.starter == "torchrun":  # one task starts all ranks of a node
        tasks, cpus = 1, size.ranks * (cpus or 1)
    return {**vars(size), "tasks": tasks, "cpus_per_task": cpus, "has_ranks": has_ranks}


def _container(config: RunConfig, *, folder: Path) -> dict[str, str]:
    """Return srun's options and the command prefix that run a command in the container."""
    slurm = config.slurm
    if slurm.container is None:
        return {"srun_options": "", "prefix": ""}
    begins_with = [Path(path) for path in (config.train.init_from, config.train.branch_from) if path]
    if list_checkpoints(run_folder(config)):  # it has begun: what it began with may be gone
        begins_with = []
    # normpath: is_relative_to would take folder/../data for a path inside the folder.
    needed = [Path(os.path.normpath(folder / path)) for path in (run_folder(config), data_folder(config), *begins_with)]
    outside = [path for path in needed if not path.is_relative_to(folder)]
    mounts = list(dict.fromkeys([*map(str, (folder, *outside)), *slurm.mounts]))
    if slurm.container_kind == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if slurm.gpus_per_node else []), "--pwd", str(folder)]
        words += [word for mount in mounts for word in ("--bind", mount)] + [slurm.container]
        return {"srun_options": "", "prefix": shlex.join(words) + " "}
    # Options of pyxis, SLURM's container plugin.
    pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    options = [f"--container-image={slurm.container}", f"--container-mounts={pairs}", f"--container-workdir={folder}"]
    return {"srun_options": "".join(f" \\\n  {shlex.quote(option)}" for option in options), "prefix": ""}


def _escape(path: Path) -> str:
    """Return a path for SLURM's log file patterns, in which %% stands for %."""
    return str(path).replace("%", "%%")
