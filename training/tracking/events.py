"""Kinds of events, and how each is sent to MLflow. An event is a dictionary that JSON can hold.

Every event has `kind` and `time_ms`, when it happened in milliseconds since the epoch. A module may add kinds of its
own to `SENDERS`. It must be harmless to send an event twice: the process may be killed before it is noted. An event
with a `path` names a file, which is there until the event is sent; `id` is its own among all events of all runs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from training.tracking.spool import Event

# MLflow's limits
METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
_LONGEST_TAG = 5000
_LONGEST_DATASET_NAME, _LONGEST_DIGEST = 500, 36

# A tag of the run with the last logged step of each metric, as JSON
LOGGED_STEPS = "trainshort.logged_steps"
# A tag with the last request of metrics: a file of the spool and the number of its last event
SENT = "trainshort.sent"
_EVENT_TAG = "trainshort.event"
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow nests runs
_TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's own, by which its page finds the tables of a run


def send_start(client: Any, run_id: str, event: Event) -> None:
    """Set tags and parameters of a start; the run has been opened.

    MLflow does not let parameters change: if a resumed run changes one, it is logged as a tag. A tag in `listed_tags`
    holds the values of all starts.
    """
    data = client.get_run(run_id).data
    params: dict[str, str] = event["params"]
    new = {key: value for key, value in params.items() if key not in data.params}
    changed = {f"resumed.{key}": text for key, text in params.items() if data.params.get(key, text) != text}
    listed = {name: _with(data.tags.get(name), value) for name, value in event.get("listed_tags", {}).items()}
    send_tags(client, run_id, {"tags": {**event["tags"], **listed, **changed}})
    _log_params(client, run_id, new)


def send_metrics(client: Any, run_id: str, event: Event) -> None:
    """Log `points`, pairs of name, value, time_ms and step, and `tags` in the same request as the last of them."""
    from mlflow.entities import Metric, RunTag

    points = [Metric(*point) for point in event["points"]]
    tags = [RunTag(key, value) for key, value in event["tags"].items()]
    # the tags are sent with the last batch: they state that everything before was logged
    size = METRICS_PER_REQUEST - len(tags)
    for first in range(0, max(1, len(points)), size):
        is_last = first + size >= len(points)
        client.log_batch(run_id, metrics=points[first : first + size], tags=tags if is_last else [])


def send_tags(client: Any, run_id: str, event: Event) -> None:
    """Set `tags`, in place of those of the same names."""
    from mlflow.entities import RunTag

    tags = [RunTag(key, str(value)) for key, value in event["tags"].items()]
    for batch in _batches(tags):
        client.log_batch(run_id, tags=batch)


def send_artifact(client: Any, run_id: str, event: Event) -> None:
    """Copy the file `path` to the folder `folder` of the run's artifacts."""
    client.log_artifact(run_id, event["path"], artifact_path=event["folder"])


def send_inputs(client: Any, run_id: str, event: Event) -> None:
    """Log `datasets` as inputs of the run; one that it has already is not added again."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=each["name"][:_LONGEST_DATASET_NAME],
                digest=each["sha256"][:_LONGEST_DIGEST],
                source_type="local",
                source=json.dumps({"uri": each["path"] or ""}),
                profile=json.dumps({**each["profile"], "sha256": each["sha256"]}),
            ),
            tags=[InputTag("mlflow.data.context", each["context"])],
        )
        for each in event["datasets"]
    ]
    client.log_inputs(run_id, inputs)


def send_text(client: Any, run_id: str, event: Event) -> None:
    """Write `text` to the artifact `artifact`, in place of an earlier one."""
    client.log_text(run_id, event["text"], event["artifact"])


def send_table(client: Any, run_id: str, event: Event) -> None:
    """Write `table` to the artifact `artifact`, in place of an earlier one, and list it in MLflow's tag."""
    client.log_text(run_id, json.dumps(event["table"]), event["artifact"])
    tables = json.loads(client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
    entry = {"path": event["artifact"], "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, _TABLES_TAG, json.dumps([*tables, entry]))


def send_end(client: Any, run_id: str, event: Event) -> None:
    """End the run with `status`, at the time of the event."""
    client.set_terminated(run_id, status=event["status"], end_time=event["time_ms"])


def send_nested(client: Any, run_id: str, event: Event) -> None:
    """Make a run below the run: its `name`, `began_ms`, `status`, `params`, `tags`, and `points` as of metrics."""
    parent = client.get_run(run_id)
    user = parent.data.tags.get("mlflow.user", "")
    tags = {PARENT_TAG: run_id, "mlflow.user": user, **event["tags"]}
    nested = create_once(client, parent.info.experiment_id, event, began_ms=event["began_ms"], tags=tags).info.run_id
    _log_params(client, nested, event["params"])
    send_metrics(client, nested, {"points": event["points"], "tags": {}})
    send_end(client, nested, event)


def create_once(client: Any, experiment_id: str, event: Event, *, began_ms: int, tags: Mapping[str, str]) -> Any:
    """Return a new run named `name`, or the one that was made of this event before: the answer may have been lost."""
    mark = str(event["id"])
    known = client.search_runs([experiment_id], filter_string=f"tags.`{_EVENT_TAG}` = '{mark}'", max_results=1)
    if known:
        return known[0]
    return client.create_run(
        experiment_id, start_time=began_ms, run_name=event["name"], tags={**tags, _EVENT_TAG: mark}
    )


# What sends an event of each kind: called with the client, the id of the run, and the event
SENDERS: dict[str, Callable[[Any, str, Event], None]] = {
    "start": send_start,
    "metrics": send_metrics,
    "tags": send_tags,
    "artifact": send_artifact,
    "text": send_text,
    "table": send_table,
    "inputs": send_inputs,
    "finish": send_end,
    "ended": send_end,
    "nested": send_nested,
}
# Kinds that need the store of artifacts, which may be down or read-only while the rest is not: they wait by themselves.
NEED_ARTIFACT_STORE = {"artifact", "text", "table"}


def _log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for batch in _batches([Param(key, value) for key, value in params.items()]):
        client.log_batch(run_id, params=batch)


def _batches(entities: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for first in range(0, len(entities), _PARAMS_PER_REQUEST):
        yield entities[first : first + _PARAMS_PER_REQUEST]


def _with(known: str | None, value: str) -> str:
    """Return a list of values with one more, as JSON; the oldest give way where it becomes too long for a tag."""
    try:
        values = json.loads(known) if known else []
    except ValueError:
        values = []
    values = [str(each) for each in values if each != value] if isinstance(values, list) else []
    values.append(value)
    while len(json.dumps(values)) > _LONGEST_TAG:
        del values[0]
    return json.dumps(values)
