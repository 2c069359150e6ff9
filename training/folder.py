"""The run folder: made at a run's first start, checked at later starts. Rank 0 writes it, all ranks read it."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, MachineError
from configs.files import try_folder, whole_file, write_json
from configs.load import dump_run, load_run
from configs.paths import (
    certificates_path,
    checkpoints_folder,
    config_file,
    data_folder,
    environment_path,
    logs_folder,
    rollbacks_file,
    run_folder,
    started_in,
)
from configs.schema import RunConfig, Train
from configs.strict_yaml import as_yaml
from configs.train_rules import train_problems
from data_pipeline.manifest import same_content, same_inputs
from parallel.layout import Layout
from parallel.start import environment, slurm_job
from training.checkpoint.manifest import CONFIG_NAME, Manifest, find_checkpoint, list_checkpoints
from training.incarnation import Fence, begin_incarnation
from training.metrics_reader import newest_step
from training.schedule import first_changed_step
from training.versions import installed_versions, python_version, source_code

if TYPE_CHECKING:
    import torch

# prefixes of keys that a later start may change: the model, the learning rate and the sample order are the same
MAY_CHANGE = (
    "parallel",
    "model.windows",
    "train.steps",
    "train.micro_batch",
    "train.compile",
    "train.recompute",
    "train.deterministic",
    "train.spike",
    "train.rollbacks",
    "train.log_every",
    "checkpoint",
    "evaluate",
    "track",
    "slurm",
    "run.dir",
)
# keys that name the data: the same data in another place, or spelled differently, is not a change
_DATA_KEYS = ("data.dir", "data.sources", "data.tokenizer")
# keys that name a checkpoint, which may be spelled differently
CHECKPOINT_KEYS = ("train.init_from", "train.branch_from")
# keys that may change while the learning rates of all steps that were taken stay the same
_SCHEDULE_KEYS = ("train.decay_steps", "train.cooldown_steps")


def with_fixed_keys(config: RunConfig, *, run_dir: Path, warn: bool = False) -> RunConfig:
    """Return the run with the keys that its first start fixed: the schedule's steps, the trunk's checkpoint.

    Args:
        config: The run file with its overrides.
        run_dir: The run folder.
        warn: Whether to warn about the trunk's broken checkpoints that are skipped: no, if a later check of the same
            start does.
    Raises:
        InputError: the folder holds a run that differs in keys that must not change; names each. Or the schedule does
            not fit its fixed steps; or, at a first start, there is no checkpoint at `train.branch_from`.
    """
    first = _first_config(run_dir)
    before = load_run(str(first)) if first else None
    if config.train.decay_steps is None:
        config = _with_train(config, decay_steps=before.train.decay_steps if before else config.train.steps)
    if config.train.cooldown_steps is None and before is not None:
        config = _with_train(config, cooldown_steps=before.train.cooldown_steps)
    if config.train.branch_from is not None and (before is None or not _has_trained(run_dir)):
        # A run folder's newest checkpoint may be another one at the next start.
        trunk, _ = named_checkpoint(Path(config.train.branch_from), key="train.branch_from", warn=warn)
        config = _with_train(config, branch_from=str(trunk))
        before = before and _with_train(before, branch_from=config.train.branch_from)
    elif before is not None:
        config = with_fixed_branch(config, first=before)
    if before is not None:
        trained = next((saved.step for saved in reversed(list_checkpoints(run_dir))), 0)
        refuse_changes(before, config, run_dir=run_dir, trained=trained)
    for problem in train_problems(config):  # with the schedule's steps that the first start fixed
        raise InputError(problem)
    return config


def named_checkpoint(path: Path, *, key: str, warn: bool = True) -> tuple[Path, Manifest]:
    """Return the checkpoint that a key of the run file names, and its manifest; see `find_checkpoint`.

    Raises:
        InputError: there is no checkpoint, or none is whole; names the key.
    """
    try:
        return find_checkpoint(path, warn=warn)
    except InputError as error:
        raise InputError(f"{key} {path}: {error}") from None


def _has_trained(run_dir: Path) -> bool:
    return bool(list_checkpoints(run_dir) or newest_step(run_dir)) or rollbacks_file(run_dir).exists()


def with_fixed_branch(config: RunConfig, *, first: RunConfig) -> RunConfig:
    """Return the run with the checkpoint of `train.branch_from` that its first start took from the same run folder."""
    given, fixed = config.train.branch_from, first.train.branch_from
    if given is None or fixed is None:
        return config
    there = started_in(run_folder(config), named=first.run.dir) / fixed
    if Path(given) != Path(fixed).parent.parent and Path(given).resolve() != there.resolve().parent.parent:
        return config
    return _with_train(config, branch_from=fixed if Path(fixed).resolve() == there.resolve() else str(there))


def _with_train(config: RunConfig, **keys: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


def _first_config(run_dir: Path) -> Path | None:
    """Return the run file of an earlier start; if it is lost, the copy in the newest checkpoint that has one."""
    copies = [checkpoint.path / CONFIG_NAME for checkpoint in reversed(list_checkpoints(run_dir))]
    return next((path for path in (config_file(run_dir), *copies) if path.is_file()), None)


def claim_run_folder(config: RunConfig, *, layout: Layout, device: "torch.device") -> Fence:
    """Make this the newest start of the run folder; write config.yaml and environment.json.

    Raises:
        MachineError: the folder cannot be written.
    """
    run_dir = run_folder(config)
    with report_write_errors(run_dir):
        logs_folder(run_dir).mkdir(parents=True, exist_ok=True)
        try_folder(checkpoints_folder(run_dir))  # now, not at the first save
        # Before any file is written: from here on, an older start that is still alive sees that it is superseded.
        fence = begin_incarnation(run_dir)
        _write_records(config, fence=fence, layout=layout, device=device)
    return fence


@contextmanager
def report_write_errors(run_dir: Path) -> Iterator[None]:
    """Turn an OSError while the block writes to the run folder into an error that says what to do.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"run folder {run_dir} cannot be written ({error.strerror}): free space, fix its permissions, or set "
            "another run.dir"
        ) from None


def _write_records(config: RunConfig, *, fence: Fence, layout: Layout, device: "torch.device") -> None:
    run_dir = fence.run_dir
    with whole_file(config_file(run_dir), mark=f".{fence.token}") as temporary:
        temporary.write_text(dump_run(config), encoding="utf-8")
    document = {
        "python": python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "world_size": layout.world_size,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data, "zero": layout.zero},
        "slurm": slurm_job(environment()),
        "packages": installed_versions(),
        "code": source_code(),
    }
    write_json(environment_path(run_dir), document, mark=f".{fence.token}")


def device_name(device: "torch.device") -> str:
    """Return the name of a GPU, or of this machine's kind of CPU."""
    import torch  # here: the launcher uses `with_fixed_keys` and must not wait for torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def record_certificate(document: dict[str, Any], *, run_dir: Path, step: int) -> Path:
    """Append a start's certificate to certificates.jsonl, one line per start; return the file."""
    path = certificates_path(run_dir)
    line = {"started_at": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **document}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


def refuse_changes(first: RunConfig, config: RunConfig, *, run_dir: Path, trained: int) -> None:
    """Refuse a run that differs from that of the first start in keys that must not change.

    Args:
        first: The run of the first start.
        config: The run now.
        run_dir: The run folder.
        trained: Steps that the run has taken: the learning rates of these must not change.
    Raises:
        InputError: names each key, with both values.
    """
    before, now = with_dotted_keys(first.model_dump()), with_dotted_keys(config.model_dump())
    changed = [key for key in before if before[key] != now.get(key) and not key.startswith(MAY_CHANGE)]
    if any(key in _DATA_KEYS for key in changed) and _is_same_data(first, config):
        changed = [key for key in changed if key not in _DATA_KEYS]
    there = started_in(run_dir, named=first.run.dir)
    changed = [
        key
        for key in changed
        if key not in CHECKPOINT_KEYS or _absolute(before[key], there) != _absolute(now[key], Path())
    ]
    step = first_changed_step(first.train, config.train)
    if step is None or step > trained:
        changed = [key for key in changed if key not in _SCHEDULE_KEYS]
    changes = [f"{key} was {as_yaml(before[key])}, is {as_yaml(now.get(key))}" for key in changed]
    if not changes:
        return
    advice = "set the old values, or choose another run.dir"
    if all(key.startswith("train.") for key in changed):
        advice += (
            ", which train.init_from lets begin with the weights of this one"
            if "train.optimizer" in changed
            else ", which train.branch_from lets go on from a checkpoint of this one"
        )
    if step is not None and set(changed) <= set(_SCHEDULE_KEYS):
        advice = (
            f"the learning rate would change from step {step} on, and step {trained} is done; set the old values, or "
            f"continue in {another_run(first.train, full_until=step - 1)}"
        )
    raise InputError(f"{run_dir} holds a run that this one would change: {'; '.join(changes)}: {advice}")


def another_run(train: Train, *, full_until: int) -> str:
    """Return where to continue with another schedule and, if steps after the warm-up had the full rate, from which.

    Args:
        train: The section of the run.
        full_until: The last step at the full learning rate, in the old schedule and in the new.
    """
    where = f", from a checkpoint of step {full_until} or before" if full_until > train.warmup_steps else ""
    return f"another run.dir with train.branch_from{where}"


def _is_same_data(first: RunConfig, config: RunConfig) -> bool:
    """Return whether two runs name the same prepared data, which may have been moved or copied."""
    folders = (data_folder(first), data_folder(config))
    return same_inputs(folders[1], first.data, config.data) and same_content(*folders)


def _absolute(path: str | None, folder: Path) -> Path | None:
    return None if path is None else (folder / path).resolve()


def with_dotted_keys(value: Any, *, prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one level: {"train": {"steps": 9}} is {"train.steps": 9}."""
    if not isinstance(value, dict):
        return {prefix: value}
    keys: dict[str, Any] = {}
    for key, inner in value.items():
        keys.update(with_dotted_keys(inner, prefix=f"{prefix}.{key}" if prefix else key))
    return keys
