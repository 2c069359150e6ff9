"""A server that runs an export is started, asked, compared and stopped. Here it is a script that answers as told."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import MachineError, TrainshortError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.support.exports import train_sentencepiece
from tests.support.formula_model import open_formula_model
from training.export.formats.servers import InferenceServer
from training.export.formats.table import FORMATS
from training.export.parity import Continuation
from training.export.run import export_checkpoint
from training.export.serve import check_served

# Arguments: what to do, a folder for what it saw, model, port.
SCRIPT = """
import http.server, json, os, sys, time
from pathlib import Path
mode, folder, model, port = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if mode == "dies":
    print("no room for keys", "and values")
    sys.exit(7)
if mode in ("breaks", "fails"):
    print("(Main pid=1) WARNING [files.py:2] `OSError: too few files` may follow")
    print("(Worker pid=2) ERROR [worker.py:3] ValueError: no room")
    print("RuntimeError: see above", flush=True)
if mode == "breaks":
    sys.exit(1)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen = {"asked": asked, "path": self.path, "environment": dict(os.environ), "pid": os.getpid()}
        (folder / "seen.tmp").write_text(json.dumps(seen))
        (folder / "seen.tmp").rename(folder / "seen.json")
        if mode == "silent":
            time.sleep(100)
        answer = (folder / "answer.json").read_bytes()
        loading = mode == "loads" and not (folder / "loaded").exists()
        (folder / "loaded").touch()
        self.send_response(503 if loading else {"refuses": 400, "fails": 500}.get(mode, 200))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PROMPT, NEW = "The quick", " brown fox jumps over"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


def server_that(mode: str, folder: Path) -> InferenceServer:
    (folder / "server.py").write_text(SCRIPT)
    command = (sys.executable, str(folder / "server.py"), mode, str(folder), "{model}", "{port}", "{context}")
    tolerances = dict.fromkeys(("fp32", "f32"), 1e-3)
    return InferenceServer("fake", "a fake", command, (), (), tolerances, {"repeat_penalty": 1.0}, ("bloom",))


def answer(folder: Path, text: str, *, prompt_tokens: int) -> None:
    values = {"choices": [{"text": text}], "usage": {"prompt_tokens": prompt_tokens}}
    (folder / "answer.json").write_text(json.dumps(values))


def expected_of(tokenizer: Tokenizer) -> Continuation:
    ids = tokenizer.encode(NEW)
    logits = torch.zeros(len(ids), tokenizer.vocab_size)
    logits[range(len(ids)), ids] = 5.0
    return Continuation(PROMPT, tuple(tokenizer.encode(PROMPT)), tuple(ids), logits)


def check(folder: Path, mode: str, tokenizer: Tokenizer) -> str:
    expected = expected_of(tokenizer)
    model = folder / "model"
    return str(check_served(server_that(mode, folder), model, expected=expected, tokenizer=tokenizer, tolerance=0.1))


def is_gone(folder: Path) -> bool:
    pid = json.loads((folder / "seen.json").read_text())["pid"]
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("mode", ["answers", "loads"])
def test_the_same_text_is_reported_and_the_server_stopped(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("HOST", "0.0.0.0")  # llama-cpp-python's server would listen there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    expected = expected_of(tokenizer)
    answer(tmp_path, NEW, prompt_tokens=len(expected.prompt_ids))
    assert check(tmp_path, mode, tokenizer) == f"fake serves {len(expected.ids)} equal greedy tokens"
    assert is_gone(tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    wanted = {"prompt": PROMPT, "max_tokens": len(expected.ids), "temperature": 0, "repeat_penalty": 1.0}
    assert seen["path"] == "/v1/completions"
    assert {key: seen["asked"][key] for key in wanted} == wanted
    assert {"HOST", "http_proxy"}.isdisjoint(seen["environment"])
    assert {"HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "PATH"} <= seen["environment"].keys()


@pytest.mark.parametrize(
    ("mode", "text", "more_tokens", "error", "message"),
    [
        ("answers", " brown cat", 0, TrainshortError, r"fake continues 'The quick' with ' brown cat', the trained "),
        ("answers", NEW, 1, TrainshortError, r"fake reads \d+ tokens where the trained model reads \d+: nothing was "),
        ("refuses", NEW, 0, TrainshortError, r"fake refused a completion \(400: .*brown fox"),
        ("fails", NEW, 0, TrainshortError, r"refused a completion \(500: .*; it wrote ValueError: no room\): nothing "),
        ("dies", NEW, 0, MachineError, r"ended with exit code 7 .* \(it wrote no room for keys and values\): nothing "),
        ("breaks", NEW, 0, MachineError, r"ended with exit code 1 .* \(it wrote ValueError: no room\): nothing "),
        ("silent", NEW, 0, MachineError, r"fake gave no answer within 5 seconds \(it wrote nothing\): nothing was "),
    ],
)
def test_what_is_not_the_same_answer_is_refused(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    text: str,
    more_tokens: int,
    error: type[TrainshortError],
    message: str,
) -> None:
    monkeypatch.setattr("training.export.serve.START_SECONDS", 5 if mode == "silent" else 120)
    answer(tmp_path, text, prompt_tokens=len(expected_of(tokenizer).prompt_ids) + more_tokens)
    with pytest.raises(error, match=message):
        check(tmp_path, mode, tokenizer)
    assert mode in ("dies", "breaks") or is_gone(tmp_path)


def test_ctrl_c_stops_the_server(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def press() -> None:
        while not (tmp_path / "seen.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        check(tmp_path, "silent", tokenizer)
    assert is_gone(tmp_path)


def test_an_export_that_is_served_otherwise_is_removed(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_formula_model(tmp_path, run_values, monkeypatch)
    fake = server_that("answers", tmp_path)
    monkeypatch.setitem(FORMATS, "hf", dataclasses.replace(FORMATS["hf"], servers=(fake,)))
    answer(tmp_path, "another text", prompt_tokens=1)
    with pytest.raises(TrainshortError, match=r"fake reads 1 tokens where the trained model reads \d+"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "out" / "hf", serve_check=True)
    assert not (tmp_path / "out").exists()
