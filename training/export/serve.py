"""Serve an exported model on the loopback interface, and compare its greedy completion with the trained model's."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from configs.errors import MachineError, TrainshortError, in_brief
from configs.terminal import printable
from data_pipeline.tokenizer import Tokenizer
from parallel.die_with_parent import dying_with_parent
from parallel.start import environment
from training.export.formats.servers import InferenceServer
from training.export.parity import Continuation, compare_text
from training.export.result import ServedText

START_SECONDS = 900.0  # until a server has loaded the model and answered
_STOP_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_LOADING = 503  # what llama-server answers until the model is loaded
# Some of these servers take every setting from variables with names as plain as HOST and MODEL.
_PASSED_ON = re.compile(
    r"PATH|HOME|USER|LANG|LC_.*|TMPDIR|LD_LIBRARY_PATH|PYTHON.*|XDG_.*|OMP_.*|CUDA_.*|NVIDIA_.*|VLLM_.*"
)
# The first is the cause: vLLM's other processes then end with their own. Where it was logged may stand before it.
_EXCEPTION = re.compile(r"^(?:\(.*\] )?([\w.]+(?:Error|Exception): .+)", re.MULTILINE)
_ADVICE = "try the server by hand, or export without --serve-check"
_NO_NETWORK = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def check_served(
    server: InferenceServer, model: Path, *, expected: Continuation, tokenizer: Tokenizer, tolerance: float
) -> ServedText:
    """Start a server, let it continue a text greedily, and stop it.

    Args:
        server: How to start it.
        model: The exported file or folder.
        expected: The trained model's continuation.
        tokenizer: The trained model's tokenizer.
        tolerance: Logits that differ by less may be in either order.
    Raises:
        MachineError: the server ended, or gave no answer.
        TrainshortError: it reads other tokens, or continues with another text.
    """
    port, asked = _free_port(), len(expected.ids)
    context = len(expected.prompt_ids) + asked
    request = {"model": "model", "prompt": expected.prompt, "max_tokens": asked, "temperature": 0, **server.request}
    with _running(server, server.arguments(model, port=port, context=context)) as (process, log):
        answer = _complete(server, port, request, process=process, log=log)
    try:
        text, prompt_tokens = str(answer["choices"][0]["text"]), int(answer["usage"]["prompt_tokens"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise TrainshortError(
            f"{server.name} gave an answer without a text ({in_brief(str(answer))}): nothing was exported"
        ) from None
    if prompt_tokens != len(expected.prompt_ids):
        raise TrainshortError(
            f"{server.name} reads {prompt_tokens} tokens where the trained model reads {len(expected.prompt_ids)}: "
            "nothing was exported; report this"
        )
    equal = compare_text(expected, text, tokenizer=tokenizer, tolerance=tolerance, engine=server.name)
    return ServedText(server.name, server.version, tokens=equal, asked=asked)


@contextmanager
def _running(server: InferenceServer, command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a server and yield its process and its output; at the end stop it and what it has started."""
    kept = {name: value for name, value in environment().items() if _PASSED_ON.fullmatch(name)}
    kept.pop("VLLM_API_KEY", None)  # it would ask for the key
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            dying_with_parent(*command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**kept, **_NO_NETWORK},
            start_new_session=True,  # a group of its own, which can be stopped whole
        )
        try:
            yield process, log
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)


def _complete(
    server: InferenceServer,
    port: int,
    values: Mapping[str, Any],
    *,
    process: subprocess.Popen[bytes],
    log: IO[bytes],
) -> Any:
    """Return the answer to a request of a completion, as soon as the server gives one."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(values).encode(),
        headers={"Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if process.poll() is not None:
            raise MachineError(
                f"{server.name} ended with exit code {process.returncode} before it gave an answer "
                f"({_reason(log)}): nothing was exported; {_ADVICE}"
            )
        try:
            with direct.open(request, timeout=left) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != _LOADING:
                words = printable(error.read(400).decode(errors="replace"))
                if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    words += f"; {_reason(log)}"
                raise TrainshortError(
                    f"{server.name} refused a completion ({error.code}: {words}): nothing was exported"
                ) from None
        except ValueError:
            raise TrainshortError(f"{server.name} gave an answer that is not JSON: nothing was exported") from None
        except (OSError, http.client.HTTPException):
            pass  # it does not listen yet
        time.sleep(_RETRY_SECONDS)
    raise MachineError(
        f"{server.name} gave no answer within {START_SECONDS:g} seconds ({_reason(log)}): nothing was "
        f"exported; {_ADVICE}"
    )


def _reason(log: IO[bytes]) -> str:
    """Return the first exception that a server's output names, or its last line."""
    log.seek(0)
    text = log.read().decode(errors="replace")
    causes = [cause[1] for cause in _EXCEPTION.finditer(text)]
    written = [line for line in text.split("\n") if line.strip()]
    line = next(iter([*causes, *written[-1:]]), None)
    return "it wrote nothing" if line is None else f"it wrote {in_brief(printable(line), most=300)}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
