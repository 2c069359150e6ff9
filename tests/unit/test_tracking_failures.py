"""Errors of MLflow: what may pass, what its cause is, and what to do."""

import sqlite3
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2 as codes
from sqlalchemy.exc import OperationalError

from training.tracking.failures import advice_on, is_about_file, may_pass, reason_of
from training.tracking.store import Store, default_store
from training.tracking.tracker import MlflowTracker

SERVER = Store("https://host:5000", "track.uri")


def caused(error: Exception, *causes: Exception) -> Exception:
    """Return an error that was raised while each of its causes was handled, the first cause last."""
    for outer, inner in zip((error, *causes), causes, strict=False):
        outer.__context__ = inner
    return error


def answered(status: int) -> Exception:
    """Return MLflow's error for an answer that is no JSON."""
    code = {401: codes.UNAUTHENTICATED, 403: codes.PERMISSION_DENIED}.get(status, codes.INTERNAL_ERROR)
    return MlflowException(f"API request to endpoint /x failed with error code {status} != 200. Response: ''", code)


def upload_refused(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status}", response=response)


LOCKED = OperationalError("select 1", {}, sqlite3.OperationalError("database is locked"))
PASSING = [
    LOCKED,
    caused(MlflowException("busy", codes.BAD_REQUEST), sqlite3.IntegrityError("UNIQUE constraint failed")),
    sqlite3.OperationalError("table experiments already exists"),
    OperationalError("create", {}, sqlite3.OperationalError("duplicate column name: step")),
    RestException({"error_code": "RESOURCE_ALREADY_EXISTS", "message": "Experiment exists"}),
    RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow down"}),
    MlflowException("API request failed with exception", codes.INTERNAL_ERROR),
    ConnectionRefusedError(111, "Connection refused"),
    requests.ConnectionError("refused"),
    *[answered(status) for status in (408, 429, 500, 502, 503, 504)],
    *[upload_refused(status) for status in (429, 503)],
]
LASTING = [
    RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no such thing"}),
    caused(MlflowException("Invalid url"), requests.exceptions.InvalidURL("not a valid host")),
    ModuleNotFoundError("No module named 'psycopg2'"),
    FileNotFoundError(2, "No such file"),
    ValueError("a value"),
    *[answered(status) for status in (401, 403, 404, 413)],
    *[upload_refused(status) for status in (403, 413)],
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: str(error)[:40])
def test_a_transient_error_is_no_refusal(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", LASTING, ids=lambda error: str(error)[:40])
def test_a_refusal_is_not_retried(error: Exception) -> None:
    assert not may_pass(error)


def test_the_reason_is_the_first_cause_whole() -> None:
    address = "https://host/" + "x" * 300
    error = caused(
        MlflowException(f"API request to {address} failed with exception ..."),
        requests.ConnectionError(f"Max retries exceeded with url: {address}"),
        ConnectionRefusedError(111, "Connection refused"),
    )
    assert reason_of(error) == "[Errno 111] Connection refused"
    # a look-up on the way is no cause
    unknown = caused(MlflowException("unsupported URI 'foo://x'", codes.INVALID_PARAMETER_VALUE), KeyError("foo"))
    assert reason_of(unknown) == "unsupported URI 'foo://x'"
    assert reason_of(LOCKED).startswith("(sqlite3.OperationalError) database is locked")
    schema = MlflowException(f"Detected out-of-date database schema {'y' * 900}, run 'mlflow db upgrade <uri>'")
    assert reason_of(schema).endswith("run 'mlflow db upgrade <uri>'")


def test_the_advice_fits_the_error() -> None:
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in advice_on(answered(401), store=SERVER)
    assert advice_on(LASTING[2], store=SERVER) == "install the package, or change track.uri"
    assert advice_on(PASSING[-1], store=SERVER) == "check that the server runs, or change track.uri"
    folder = Store("./mlruns", "track.uri")
    assert advice_on(PASSING[-1], store=folder) == "change track.uri, for example to sqlite:///mlflow.db"
    file = Store("sqlite:////data/runs/mlflow.db", "MLFLOW_TRACKING_URI")
    assert file.file == Path("/data/runs/mlflow.db")
    gone = LookupError("/data/runs/mlflow.db does not exist")  # beside a copy of a run folder
    assert advice_on(gone, store=file) == "bring it back, or change MLFLOW_TRACKING_URI"
    assert "or change track.uri" in advice_on(LOCKED, store=default_store(Path("runs/a")))
    assert advice_on(LOCKED, store=file) == "check the folder /data/runs and its disk, or change MLFLOW_TRACKING_URI"


class Locked(BaseHTTPRequestHandler):
    """A server that refuses everybody and keeps what they say."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers["Authorization"])
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_gets_the_password_and_the_log_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The password comes from the URI, from the variable that it names, or from MLFLOW_TRACKING_URI."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Locked)
    Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PW", "p@ss/word")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:p%40ss%2Fword@{place}")
    for uri in (f"http://me:p%40ss%2Fword@{place}", f"http://me:${{PW}}@{place}", f"http://{place}", None):
        tracker = MlflowTracker(tmp_path, name="a", experiment=None, uri=uri)
        tracker.start({}, tmp_path / "config.yaml")
        tracker.finish("FINISHED")
    server.shutdown()
    server.server_close()
    assert Locked.seen == [f"Basic {b64encode(b'me:p@ss/word').decode()}"] * 4
    assert caplog.text.count("refuses this run") == 4
    assert "failed with error code 401" in caplog.text
    assert "give user and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in caplog.text
    for secret in ("p@ss/word", "p%40ss%2Fword", b64encode(b"me:p@ss/word").decode()):
        assert secret not in caplog.text


def test_a_store_of_artifacts_without_access_is_waited_for() -> None:
    assert not any(
        is_about_file(error) for error in (upload_refused(403), answered(401), PermissionError(13, "denied"))
    )
    assert all(map(is_about_file, (upload_refused(413), FileNotFoundError(2, "No such file"))))


def test_records_that_cannot_be_written_are_told_as_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tracking").write_text("in place of the folder: root may write to a read-only one")
    tracker = MlflowTracker(tmp_path, name="a", experiment=None, uri=None, offline=True)
    tracker.start({}, tmp_path / "config.yaml")
    tracker.finish("FINISHED")
    assert caplog.messages[-1] == f"3 records for MLflow are lost: {tmp_path / 'tracking'} could not be written"
    assert "sends them" not in caplog.text
