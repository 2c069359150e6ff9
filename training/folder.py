"""The run folder: made at the first start, checked at the next ones. Rank 0 writes, all ranks read."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError
from configs.load import dump_run, load_run
from configs.paths import config_file, logs_folder
from configs.schema import RunConfig
from data_pipeline.atomic import whole_file
from parallel.layout import Layout

if TYPE_CHECKING:
    import torch

MAY_CHANGE = ("parallel", "train.steps", "train.micro_batch", "checkpoint", "evaluate", "track", "slurm", "run.dir")
PACKAGES = ("trainshort", "torch", "deepspeed", "megatron-core", "sentencepiece", "mlflow", "transformers", "numpy")


def settle(config: RunConfig, *, run_dir: Path) -> RunConfig:
    """Return the run with what its first start fixed: `train.decay_steps`.

    Raises:
        InputError: the folder holds a run that differs in a key that must not change; names each.
    """
    first = config_file(run_dir)
    before = load_run(str(first)) if first.is_file() else None
    fixed = before.train.decay_steps if before else config.train.steps
    if config.train.decay_steps is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"decay_steps": fixed})})
    if before is not None:
        _refuse_changes(_flat(before.model_dump()), _flat(config.model_dump()), run_dir=run_dir)
    return config


def record(config: RunConfig, *, run_dir: Path, layout: Layout, device: "torch.device") -> None:
    """Write config.yaml and environment.json."""
    import torch  # the launcher asks `settle` without

    logs_folder(run_dir).mkdir(parents=True, exist_ok=True)
    with whole_file(config_file(run_dir)) as temporary:
        temporary.write_text(dump_run(config), encoding="utf-8")
    environment = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data, "zero": layout.zero},
        "packages": {package: _version(package) for package in PACKAGES},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
