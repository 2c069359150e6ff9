"""Register exported models in MLflow's Model Registry, each as a new version of a name."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from configs.errors import InputError, MachineError, TrainshortError
from configs.paths import config_file
from configs.schema import Track
from configs.secrets import hide_secrets
from parallel.start import environment
from training.page.facts import certificate_facts
from training.tracking.client import TrackingTarget, connect, find_experiment, find_recorded, set_mlflow_defaults
from training.tracking.failures import advice_on, may_pass, reason_of
from training.tracking.mlflow_model import write_mlflow_model
from training.tracking.record import read_record
from training.tracking.store import (
    DEFAULT_EXPERIMENT,
    EXPERIMENT_VARIABLE,
    STORE_VARIABLE,
    Store,
    choose_store,
    require_known_scheme,
)
from training.tracking.sync import target_of_folder

_DATABASES = ("sqlite", "mysql", "mssql", "postgresql")
_LONGEST_NAME = 250


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        name: The registered model.
        version: Counted from 1.
        alias: Another name of the version, which says its step.
        store: The store, without secrets.
    """

    name: str
    version: int
    alias: str
    store: str

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version} (alias {self.alias}) in MLflow at {self.store}"


class ModelRegistry:
    """The registry of a run's store, with a name for what is registered; build it with `open_registry`."""

    def __init__(self, client: Any, target: TrackingTarget, *, name: str, run_id: str | None, experiment: str) -> None:
        self._client, self._target = client, target
        self._name, self._run_id, self._experiment = name, run_id, experiment

    def register(self, exported: Path) -> RegisteredVersion:
        """Upload a folder that `trainshort export --format hf` wrote, and make it the newest version of the name.

        Raises:
            MachineError: it could not be uploaded or registered; the folder stays.
        """
        with _explained(self._target.store, what=f"{exported} is exported, but not registered as {self._name}"):
            return self._register(exported)

    def _register(self, exported: Path) -> RegisteredVersion:
        client, tags = self._client, version_tags(exported)
        model = client.create_logged_model(
            self._experiment_id(),
            name=re.sub(r"[^\w -]", "_", self._name),
            source_run_id=self._run_id,
            tags=tags,
            model_type="decoder",
        )
        try:
            with TemporaryDirectory() as temporary:
                place = Path(temporary)
                write_mlflow_model(place, exported, name=tags["run"], model_id=model.model_id, run_id=self._run_id)
                client.log_model_artifacts(model.model_id, str(place))
        except BaseException:  # Ctrl-C too
            with suppress(Exception):
                client.finalize_logged_model(model.model_id, "FAILED")
            raise
        client.finalize_logged_model(model.model_id, "READY")
        if self._run_id is not None:
            from mlflow.entities import LoggedModelOutput

            client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=int(tags["step"]))])
        version = self._new_version(model, tags=tags)
        alias = f"step-{tags['step']}"
        client.set_registered_model_alias(self._name, alias, str(version))
        return RegisteredVersion(self._name, version, alias, self._target.store.public_uri)

    def _experiment_id(self) -> str:
        if self._run_id is not None:
            return str(self._client.get_run(self._run_id).info.experiment_id)
        return find_experiment(self._client, self._target, name=self._experiment)

    def _new_version(self, model: Any, *, tags: dict[str, str]) -> int:
        from mlflow.exceptions import MlflowException

        client = self._client
        try:
            client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A database would look up models:/ID in the store of the environment, which may be another one.
        is_database = self._target.store.uri.split(":")[0].partition("+")[0] in _DATABASES
        source = model.artifact_location if is_database else f"models:/{model.model_id}"
        model_id = None if is_database else model.model_id
        made = client.create_model_version(self._name, source, run_id=self._run_id, tags=tags, model_id=model_id)
        version = int(made.version)
        # MLflow's own tag, by which the page of the model names its versions
        versions = json.dumps([{"name": self._name, "version": str(version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": versions})
        return version


def open_registry(name: str, *, run_dir: Path, track: Track) -> ModelRegistry:
    """Open the registry of a run's store and check that it takes a name, before the work of an export.

    Args:
        name: The registered model, new or not.
        run_dir: The run folder, whose MLflow run the versions then name.
        track: The section of its run file.
    Raises:
        InputError: MLflow refuses the name, or the store has no registry.
        MachineError: the store cannot be reached.
    """
    require_model_name(name)
    # MLflow's own default: a server answers only once it has stored a file, of gigabytes say
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    set_mlflow_defaults()
    record = read_record(run_dir)
    target = target_of_folder(run_dir, uri=track.uri) or TrackingTarget(
        run_dir, choose_store(track.uri, run_dir=run_dir, environ=environment())
    )
    experiment = track.experiment or environment().get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT
    if record is None and target.store.file is not None and not config_file(run_dir).is_file():
        raise InputError(
            f"--register {name} needs an MLflow store: {run_dir} is not a run folder; set {STORE_VARIABLE}, or leave "
            "it out"
        )
    require_known_scheme(target.store)
    with _explained(target.store, what=f"--register {name} is not possible", refused=InputError):
        client = connect(target, run_id=record.run_id if record else None, experiment=experiment)
        _check_name(client, name, store=target.store)
        run = find_recorded(client, record, target=target) if record else None
    return ModelRegistry(client, target, name=name, run_id=run.info.run_id if run else None, experiment=experiment)


def require_model_name(name: str) -> None:
    """Refuse a name that MLflow refuses in every store; it imports nothing.

    Raises:
        InputError: says what a name may hold.
    """
    if not name.strip() or len(name) > _LONGEST_NAME or re.search(r"[/:\x00-\x1f]", name):
        raise InputError(
            f"--register {name[:_LONGEST_NAME]!r} is not a name for a model in MLflow: use 1 to {_LONGEST_NAME} "
            "letters, digits, - or _, without / and :"
        )


def version_tags(exported: Path) -> dict[str, str]:
    """Return the tags of a version, from the card and the certificate of its folder.

    They say which step of which run it is, whether its positions are what they promise, at which lengths its logits
    were compared with the trained model's, and how long a text may be.
    """
    card, certificate = (
        json.loads((exported / file).read_text(encoding="utf-8")) for file in ("export.json", "certificate.json")
    )
    origin, verified, lengths = card["origin"], card["verified"], card["lengths"]
    tags = {
        "run": origin["run"],
        "step": origin["step"],
        "certificate": certificate_facts(certificate).verdict,
        "trained_length": lengths["trained"],
        "verified_lengths": ", ".join(map(str, verified["lengths"])),
        "usable_length": lengths["usable"],
        "logit_difference": f"{verified['difference']:.2g}",
        "dtype": card["precision"]["weights"],
        "model_sha256": origin["model_sha256"],
        "tokenizer_sha256": origin["tokenizer_sha256"],
    }
    return {key: hide_secrets(str(value)) for key, value in tags.items()}


def _check_name(client: Any, name: str, *, store: Store) -> None:
    """Ask the registry for a name; that there is no such model yet is no error."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
        if "error code 404" in str(error):  # of a server that does not know the request
            raise InputError(
                f"--register {name} is not possible: MLflow at {store.public_uri} has no Model Registry; leave it out, "
                f"or change {store.setting}"
            ) from None
        raise


@contextmanager
def _explained(store: Store, *, what: str, refused: type[TrainshortError] = MachineError) -> Iterator[None]:
    """Turn errors of MLflow into one line.

    Args:
        store: The store.
        what: What is not done.
        refused: The error if a retry would not help.
    """
    try:
        yield
    except TrainshortError:
        raise
    except Exception as error:  # noqa: BLE001  of MLflow, a database driver or the network
        text = f"{what}: MLflow at {store.public_uri} says {reason_of(error)}; {advice_on(error, store=store)}"
        kind = MachineError if may_pass(error) else refused
        raise kind(hide_secrets(text, known=store.secrets(environment()))) from None
