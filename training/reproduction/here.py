"""What decides a run's result, as found here and now. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.load import load_run
from configs.paths import config_file, data_folder, own_data_folder
from configs.saved import saved_values
from configs.schema import RunConfig
from data_pipeline.hashes import file_sha256
from data_pipeline.manifest import describe_inputs
from data_pipeline.manifest_file import inputs_sha256
from parallel.start import DETERMINISTIC_VARIABLES, rank_threads
from training.checkpoint.manifest import CONFIG_NAME, list_checkpoints
from training.folder import with_dotted_keys
from training.reproduction.differences import Difference
from training.reproduction.facts import (
    begins_with,
    code_facts,
    data_facts,
    hardware_facts,
    variable_facts,
    weights_facts,
)
from training.versions import installed_versions, python_version, source_code


@dataclass(frozen=True)
class Here:
    """This machine, as the ranks of a run would see it.

    Attributes:
        gpu: Name of its GPU; None if the ranks would be CPU ranks.
        gpus: Number of its GPUs.
        cores: CPU cores that this process may use.
        variables: The environment.
    """

    gpu: str | None
    gpus: int
    cores: int
    variables: Mapping[str, str]


@dataclass(frozen=True)
class FoundConfig:
    """The run file to repeat a run with.

    Attributes:
        file: The file: config.yaml, or a copy of it that a checkpoint holds.
        config: What it says.
        difference: How config.yaml differs from that of the start; None if it does not.
    """

    file: Path
    config: RunConfig
    difference: Difference | None


def find_config(run_dir: Path, start: Mapping[str, Any]) -> FoundConfig:
    """Return the run file of a start, from a checkpoint if config.yaml was changed since.

    Raises:
        InputError: no run file can be read.
    """
    file, wanted = config_file(run_dir), start["config"].get("sha256")
    copies = [checkpoint.path / CONFIG_NAME for checkpoint in reversed(list_checkpoints(run_dir))]
    same = next((each for each in (file, *copies) if each.is_file() and file_sha256(each) == wanted), None)
    if same == file:
        return FoundConfig(file, load_run(str(file)), None)
    seen = "changed since" if file.is_file() else "missing"
    if same is None:
        difference = Difference("configuration", file.name, str(wanted)[:8], seen, "other")
        return FoundConfig(file, load_run(str(file)), difference)
    keys = _changed_keys(same, file)
    now = f"{seen}{f' in {keys}' if keys else ''}; {same.relative_to(run_dir)} is as then"
    difference = Difference("configuration", file.name, str(wanted)[:8], now, "same")
    return FoundConfig(same, load_run(str(same)), difference)


def found_at(path: str, start: Mapping[str, Any]) -> Path:
    """Return a path of a run file: as it is from here, else from the folder in which the run was started."""
    there = Path(str(start.get("folder", "."))) / path
    return there if not Path(path).exists() and there.exists() else Path(path)


def begins_with_here(config: RunConfig, start: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the result of `begins_with`, with the path as `found_at` finds it."""
    beginning = begins_with(config)
    return beginning and (beginning[0], str(found_at(beginning[1], start)))


def data_of(run_dir: Path, config: RunConfig, start: Mapping[str, Any]) -> Path:
    """Return the folder of a run's prepared data, which may have been moved with the run folder."""
    return found_at(str(data_folder(config)), start) if config.data.dir else own_data_folder(run_dir)


def prepares_the_same(config: RunConfig, start: Mapping[str, Any]) -> bool:
    """Return whether `trainshort prepare` would read what it read for a start: sources, tokenizer and packages."""
    versions = {"python": python_version(), **installed_versions()}
    tools = ("python", "sentencepiece", "tokenizers")
    if any(start["versions"].get(tool) != versions[tool] for tool in tools):
        return False
    try:
        return bool(inputs_sha256(describe_inputs(config.data)) == start["data"].get("fingerprint"))
    except InputError:  # they are gone
        return False


def facts_here(
    run_dir: Path, config: RunConfig, start: Mapping[str, Any], *, here: Here, reads_all: bool
) -> dict[str, Any]:
    """Return the sections of a start as they are here and now; not its layout and settings, which are repeated.

    Args:
        run_dir: The run folder.
        config: The run.
        start: A start in the manifest of reproduction.
        here: This machine.
        reads_all: Whether to read every byte of data and weights.
    """
    beginning, layout = begins_with_here(config, start), start["layout"]
    return {
        "code": code_facts(source_code()),
        "data": data_facts(data_of(run_dir, config, start), reads_all=reads_all),
        "weights": weights_facts(beginning, reads_all=reads_all),
        "versions": {"python": python_version(), **installed_versions()},
        "hardware": hardware_facts(gpu=here.gpu, gpus=here.gpus, cores=here.cores),
        "variables": variable_facts({**_defaults(config, layout, start, here), **here.variables}),
    }


def _defaults(config: RunConfig, layout: Mapping[str, Any], start: Mapping[str, Any], here: Here) -> dict[str, str]:
    """Return the variables that a start sets unless the environment does."""
    threads = rank_threads(cores=here.cores, ranks=layout.get("ranks", 1))
    if layout.get("starter") != "local":  # torchrun and the job's script have their own default
        threads = start["variables"].get("OMP_NUM_THREADS", threads)
    return {"OMP_NUM_THREADS": threads, **(DETERMINISTIC_VARIABLES if config.train.deterministic else {})}


def _changed_keys(then: Path, now: Path) -> str:
    try:
        before, after = with_dotted_keys(saved_values(then)), with_dotted_keys(saved_values(now))
    except (OSError, ValueError):
        return ""
    return ", ".join(key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key))
