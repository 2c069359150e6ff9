"""A real `mlflow server` with a sqlite file and a folder of artifacts, behind a proxy that breaks as asked."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from training.tracking.client import import_client, set_mlflow_defaults

_SECONDS = 180.0
# How the proxy answers: as the server does; with a 500; not at all; as the server does, but the answer is lost
Mode = Literal["pass", "fails", "hangs", "loses answers"]


class MlflowServer:
    """The server and the proxy.

    Attributes:
        uri: The proxy's address, which never changes.
        mode: How the proxy answers.
        asked: Number of requests to the proxy.
    """

    def __init__(self, folder: Path) -> None:
        self.mode: Mode = "pass"
        self.asked = 0
        self._folder, self._port = folder, _free_port()
        self._released = Event()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._proxy.server_port}"
        Thread(target=self._proxy.serve_forever, daemon=True).start()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def artifacts(self) -> Path:
        """The folder of artifacts."""
        return self._folder / "artifacts"

    def start(self) -> None:
        """Start the server; `wait` waits until it answers."""
        options = {
            "host": "127.0.0.1",
            "port": str(self._port),
            "workers": "1",
            "backend-store-uri": f"sqlite:///{self._folder}/server.db",
            "artifacts-destination": str(self.artifacts),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlflow", "server", *words],
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server answers."""
        wait_for(self._answers, seconds=_SECONDS)

    def kill(self) -> None:
        """End the server and its workers with SIGKILL."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def set_mode(self, mode: Mode) -> None:
        """Answer otherwise from now on; what hangs ends."""
        self.mode = mode
        self._released.set()
        self._released = Event()

    def close(self) -> None:
        """End both."""
        self.set_mode("fails")
        self._proxy.shutdown()
        self._proxy.server_close()
        self.kill()

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes] | None:
        """Return the server's status and answer; None to close the connection without any."""
        self.asked += 1
        if self.mode == "hangs":
            self._released.wait(60)
            return None
        if self.mode == "fails":
            return 500, b"out of order"
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
        except OSError:
            return None
        finally:
            connection.close()
        return None if self.mode == "loses answers" else (answer.status, text)

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            # not /health: the first request of the store opens it, which takes seconds
            connection.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class LoggedRun:
    """What MLflow's own client finds of a run folder's run."""

    def __init__(self, server: MlflowServer, run_dir: Path) -> None:
        set_mlflow_defaults()
        self.client: Any = import_client()(tracking_uri=server.uri)
        filters = f"tags.run_dir = '{run_dir}'"
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        [self.run] = self.client.search_runs(experiments, filter_string=filters)
        self.id, self.status = self.run.info.run_id, self.run.info.status
        self.tags: dict[str, str] = self.run.data.tags

    def steps(self, name: str) -> list[tuple[int, float]]:
        """Return each logged step of a metric with its value."""
        return [(metric.step, metric.value) for metric in self.client.get_metric_history(self.id, name)]

    def artifacts(self, folder: str | None = None) -> dict[str, int]:
        """Return the size of each artifact in a folder."""
        files = self.client.list_artifacts(self.id, folder)
        return {file.path: file.file_size for file in files if not file.is_dir}

    def nested(self) -> list[Any]:
        """Return the runs below the run."""
        filters = f"tags.`mlflow.parentRunId` = '{self.id}'"
        return list(self.client.search_runs([self.run.info.experiment_id], filter_string=filters))


def wait_for(condition: Callable[[], object], *, seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _handler(server: MlflowServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
            answer = server.forward(self.command, self.path, body, kept)
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
