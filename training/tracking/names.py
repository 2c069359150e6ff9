"""Names in MLflow: of a step's metrics, grouped as MLflow draws them, and of a run's parameters and tags."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.paths import environment_path
from configs.schema import RunConfig
from training.families.table import parameter_count
from training.folder import with_dotted_keys
from training.further_losses import PREFIX
from training.incarnation import newest_incarnation

# The MLflow name of each field of `StepResult` but the step. MLflow draws what has one prefix in one group.
METRIC_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_seen": "train/tokens_seen",
    "consumed_samples": "train/consumed_samples",
    "step_seconds": "time/step_seconds",
    "tokens_per_second": "time/tokens_per_second",
    "model_flops_utilization": "time/model_flops_utilization",
    "model_flops_utilization_causal": "time/model_flops_utilization_causal",
    "memory_gb": "memory/peak_gb",
    "attention_density": "train/attention_density",
    "validation_loss": "validation/loss",
    "validation_seconds": "time/validation_seconds",
    "save_seconds": "time/save_seconds",
    "failed_saves": "train/failed_saves",
    "rollbacks": "train/rollbacks",
    "loss_scale": "train/loss_scale",
    "energy_joules": "energy/step_joules",
}
BY_NAME = ("validation_by_length", "validation_by_source")  # fields whose values have names of their own
TOTAL_ENERGY = "energy/total_kwh"
LONG_PARAMS = "long_params.json"  # artifact with the values that are longer than MLflow's limit
_LONGEST_KEY, _LONGEST_VALUE = 250, 6000  # MLflow's limits
_LONGEST_SOURCE = 100


def tracked_name(field: str) -> str:
    """Return the MLflow name of a field of a step."""
    if field in METRIC_NAMES:
        return METRIC_NAMES[field]
    assert field.startswith(PREFIX), f"{field} has no name in MLflow"
    return "validation/loss_" + _allowed(field.removeprefix(PREFIX))


def name_over_tokens(field: str) -> str | None:
    """Return the second MLflow name of a loss, which is logged with the tokens seen as its step; None for other fields.

    MLflow then draws it over tokens, and runs with other batches compare. Any metric is drawn over tokens if
    `train/tokens_seen` is chosen as the X-axis of its chart.
    """
    if field not in ("loss", "validation_loss") and not field.startswith(PREFIX):
        return None
    return f"by_tokens/{tracked_name(field).replace('/', '_')}"


def _allowed(name: str) -> str:
    """Return a name that MLflow takes, of the path of a source: its end, and where that is not all of it, a hash."""
    allowed = re.sub(r"[^\w.-]", "_", name)
    if allowed == name and len(name) <= _LONGEST_SOURCE:
        return name
    return f"{allowed[-_LONGEST_SOURCE:]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:4]}"


def run_params(config: RunConfig, *, environment_file: Path, certificate: Path) -> dict[str, Any]:
    """Return the parameters of a run: its run file, and what it became on these ranks.

    Args:
        config: The run. Its section `slurm` counts only in a job of SLURM.
        environment_file: environment.json of this start.
        certificate: The certificates, whose last line is this start's.
    """
    values = config.model_dump(mode="json")
    environment, backend = _read(environment_file), {}
    if not environment.get("slurm"):
        del values["slurm"]
    for rank in _read(certificate).get("ranks", [])[:1]:
        backend = {"attention_backend": rank.get("backend")}
    return {
        **values,
        "parameters": parameter_count(config.model, vocab_size=config.data.vocab_size),
        "precision": config.train.precision,
        **backend,
        **{key: environment.get(key) for key in ("world_size", "device", "layout")},
    }


def flatten(params: dict[str, Any]) -> dict[str, str]:
    """Return nested values with dotted keys: {"model": {"heads": 4}} becomes {"model.heads": "4"}.

    Keys that are not set (None) are left out. Lists become JSON. Nothing is cut.
    """
    return {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else str(value)
        for key, value in with_dotted_keys(params).items()
        if value is not None
    }


def within_limits(flat: Mapping[str, str]) -> dict[str, str]:
    """Return parameters as MLflow takes them; a value that is too long says where it is whole."""
    rest = f" ... (whole in {LONG_PARAMS})"
    cut = {key: text[: _LONGEST_VALUE - len(rest)] + rest for key, text in long_values(flat).items()}
    return {key[:_LONGEST_KEY]: text for key, text in {**flat, **cut}.items()}


def long_values(flat: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters whose values are longer than MLflow's limit."""
    return {key: text for key, text in flat.items() if len(text) > _LONGEST_VALUE}


def run_tags(environment_file: Path) -> dict[str, str]:
    """Return MLflow's own tags for where a run comes from, the number of starts, and the SLURM job of this one."""
    environment = _read(environment_file)
    code, job = environment.get("code") or {}, environment.get("slurm") or {}
    newest = newest_incarnation(environment_file.parent)
    tags: Mapping[str, str | None] = {
        "trainshort.starts": str(newest.number) if newest else None,
        "mlflow.source.name": "trainshort train",
        "mlflow.source.type": "JOB" if job else "LOCAL",
        "mlflow.source.git.commit": code.get("commit"),
        "mlflow.source.git.branch": code.get("branch"),
        "mlflow.source.git.repoURL": code.get("repository"),
        "mlflow.source.git.dirty": str(bool(code["diff"])).lower() if "diff" in code else None,
        "slurm.job_id": job.get("job_id"),
        "slurm.nodes": job.get("nodes"),
    }
    return {name: value for name, value in tags.items() if value is not None}


def tags_of_starts(run_dir: Path) -> dict[str, str]:
    """Return the tags that list the values of all starts of a run, with this start's values."""
    environment = _read(environment_path(run_dir))
    newest = newest_incarnation(run_dir)
    job = environment.get("slurm") or {}
    layout = ", ".join(f"{axis} {size}" for axis, size in (environment.get("layout") or {}).items())
    tags: Mapping[str, str | None] = {
        "trainshort.hosts": job.get("nodes") or (newest.host if newest else None),
        "trainshort.layouts": layout,
        "trainshort.jobs": job.get("job_id"),
    }
    return {name: value for name, value in tags.items() if value}


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON of a file, of its last line if it has several documents; empty if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text if text.startswith("{\n") else text.splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return values if isinstance(values, dict) else {}
