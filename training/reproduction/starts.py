"""The manifest of reproduction, RUN_DIR/reproduce.json: for each start of a run, what decided its result. No torch."""

import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.commands import typed_command
from configs.errors import InputError
from configs.files import write_json
from configs.paths import config_file, data_folder, environment_path, reproduction_file
from configs.schema import RunConfig
from data_pipeline.hashes import file_sha256
from parallel.layout import Layout
from parallel.start import ProcessRank, environment, node_count
from training.incarnation import Fence
from training.reproduction.facts import (
    begins_with,
    code_facts,
    data_facts,
    hardware_facts,
    setting_facts,
    variable_facts,
    weights_facts,
)

logger = logging.getLogger(__name__)

STARTS_FORMAT = 1
COMMAND_VARIABLE = "TRAINSHORT_COMMAND"  # the launcher's own command line, which its ranks do not have
# what `reproduce` reads of each start, which a file that was edited by hand may lack
_NEEDED: dict[str, tuple[str, ...]] = {
    "code": ("sha256",),
    "config": ("sha256",),
    "data": ("problem",),
    "weights": ("problem",),
    "versions": (),
    "hardware": ("device", "cpu", "gpus", "cores"),
    "layout": ("ranks", "nodes", "starter"),
    "settings": (),
    "variables": (),
}


def record_start(
    config: RunConfig, process: ProcessRank, *, fence: Fence, layout: Layout, step: int, gpu: str | None, gpus: int
) -> None:
    """Append this start to the manifest of reproduction. Rank 0 calls it, after `claim_run_folder`.

    Args:
        config: The run.
        process: This process among the ranks.
        fence: Fence of this start.
        layout: How the ranks are split into axes.
        step: The step that training begins from.
        gpu: Name of this rank's GPU; None on a CPU.
        gpus: GPUs that this process sees.
    Raises:
        OSError: the run folder cannot be written.
    """
    run_dir, environ = fence.run_dir, environment()
    recorded: dict[str, Any] = json.loads(environment_path(run_dir).read_text(encoding="utf-8"))
    start = {
        "start": fence.token,
        "started_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "command": environ.get(COMMAND_VARIABLE) or typed_command(),
        "folder": str(Path.cwd()),
        "code": code_facts(recorded["code"]),
        "config": {"file": config_file(run_dir).name, "sha256": file_sha256(config_file(run_dir))},
        "data": data_facts(data_folder(config)),
        "weights": weights_facts(begins_with(config)),
        "versions": {"python": recorded["python"], **recorded["packages"]},
        "hardware": hardware_facts(gpu=gpu, gpus=gpus, cores=len(os.sched_getaffinity(0))),
        "layout": {
            **recorded["layout"],
            "offload": layout.offload,
            "overlap": layout.overlap,
            "ranks": layout.world_size,
            "nodes": node_count(environ),
            "starter": process.starter,
        },
        "settings": setting_facts(config),
        "variables": variable_facts(environ),
    }
    starts = [*_earlier_starts(run_dir), start]
    document = {"format_version": STARTS_FORMAT, "starts": starts}
    write_json(reproduction_file(run_dir), document, mark=f".{fence.token}")


def recorded_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, oldest first; empty if there is no manifest of reproduction.

    Raises:
        InputError: the file is broken or of another version.
    """
    file = reproduction_file(run_dir)
    try:
        document: Any = json.loads(file.read_text(encoding="utf-8"))
        version = document["format_version"]
        if version != STARTS_FORMAT:
            raise InputError(
                f"{file} has format_version {str(version)[:20]}, this version reads {STARTS_FORMAT}: use the version "
                "that wrote it"
            )
        starts: list[dict[str, Any]] = document["starts"]
        if not starts or not all(map(_is_start, starts)):
            raise ValueError("a start lacks what decides its result")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read ({error!r}): bring back a copy of it; training writes a new one at its next start"
        ) from None
    return starts


def _is_start(start: Mapping[str, Any]) -> bool:
    sections = [start[section] for section in _NEEDED]
    is_whole = all(set(keys) <= set(section) for section, keys in zip(sections, _NEEDED.values(), strict=True))
    return is_whole and isinstance(start["step"], int) and {"started_at", "command"} <= set(start)


def _earlier_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the starts before this one; a broken file is kept under another name, and must not stop training."""
    try:
        return recorded_starts(run_dir)
    except InputError as error:
        file = reproduction_file(run_dir)
        broken = file.with_name(f"{file.name}.broken")
        file.replace(broken)
        logger.warning("%s; it cannot be continued and is kept as %s", str(error).partition(": ")[0], broken)
        return []
