"""The run folder: made at the first start, checked at the next ones. Rank 0 writes, all ranks read."""

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, MachineError
from configs.files import whole_file
from configs.load import dump_run, load_run
from configs.paths import config_file, logs_folder, run_folder
from configs.schema import RunConfig
from parallel.layout import Layout
from training.checkpoint.manifest import CONFIG, list_checkpoints
from training.incarnation import Fence, begin
from training.versions import installed_versions, source_code

if TYPE_CHECKING:
    import torch

MAY_CHANGE = ("parallel", "train.steps", "train.micro_batch", "checkpoint", "evaluate", "track", "slurm", "run.dir")


def with_fixed_keys(config: RunConfig, *, run_dir: Path) -> RunConfig:
    """Return the run with what its first start fixed: `train.decay_steps`.

    Raises:
        InputError: the folder holds a run that differs in a key that must not change; names each.
    """
    first = _first_config(run_dir)
    before = load_run(str(first)) if first else None
    fixed = before.train.decay_steps if before else config.train.steps
    if config.train.decay_steps is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"decay_steps": fixed})})
    if before is not None:
        _refuse_changes(_flat(before.model_dump()), _flat(config.model_dump()), run_dir=run_dir)
    return config


def _first_config(run_dir: Path) -> Path | None:
    """Return the run as an earlier start resolved it; where its file is lost, as the newest checkpoint holds it."""
    kept = [found.path / CONFIG for found in reversed(list_checkpoints(run_dir))]
    return next((path for path in (config_file(run_dir), *kept) if path.is_file()), None)


def claim_run_folder(config: RunConfig, *, layout: Layout, device: "torch.device") -> Fence:
    """Make the run folder this start's, and record in it what runs: config.yaml and environment.json.

    Raises:
        MachineError: the folder cannot be written.
    """
    run_dir = run_folder(config)
    with writing(run_dir):
        logs_folder(run_dir).mkdir(parents=True, exist_ok=True)
        fence = begin(run_dir)
        _record(config, fence=fence, layout=layout, device=device)
    return fence


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn what the disk says against writing into the run folder into an error that a user can read.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"run folder {run_dir} cannot be written ({error.strerror}): free space, mend its permissions, or set "
            "another run.dir"
        ) from None


def _record(config: RunConfig, *, fence: Fence, layout: Layout, device: "torch.device") -> None:
    import torch  # the launcher asks `settle` without

    run_dir = fence.run_dir

    with whole_file(config_file(run_dir), mark=f".{fence.token}") as temporary:
        temporary.write_text(dump_run(config), encoding="utf-8")
    environment = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data, "zero": layout.zero},
        "packages": installed_versions(),
        "code": source_code(),
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def record_certificate(document: dict[str, Any], *, run_dir: Path, step: int) -> Path:
    """Add a start's certificate to certificates.jsonl, one line a start, and return the file."""
    path = run_dir / "certificates.jsonl"
    line = {"started_at": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **document}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], *, run_dir: Path) -> None:
    changed = [
        f"{key} was {before[key]!r}, is {now.get(key)!r}"
        for key in before
        if before[key] != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise InputError(
            f"{run_dir} holds a run that this one would change: {'; '.join(changed)}: "
            "set the old values, or choose another run.dir"
        )


def _flat(value: Any, *, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(_flat(inner, prefix=f"{prefix}.{key}" if prefix else key))
    return found
