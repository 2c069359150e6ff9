"""Curves in TensorBoard and Weights & Biases themselves: `make test-trackers`, which installs them."""

import json
import resource
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Call
from tests.support.compared_runs import add_report, make_run, replace_lines
from tests.support.processes import wait_until

_HEADER, _BLOCK, _WHOLE, _LAST = 7, 1 << 15, 1, 4
pytestmark = [pytest.mark.trackers, pytest.mark.filterwarnings("default")]


def train(run_dir: Path, trainshort: Call, *options: str) -> None:
    """Copy a run of ten steps in three parts; after the second it goes on from step 5, with other losses."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    again = [line if line["step"] <= 5 else {**line, "loss": line["loss"] + 1} for line in lines]
    for part in (lines[:4], lines[:8], again):
        replace_lines(run_dir, part)
        answer = trainshort("track", "copy", str(run_dir), *options)
        assert answer.code == 0, answer.error
    add_report(run_dir, {32: 21.0, 64: 20.5})
    add_report(run_dir, {32: 30.0}, step=5, newest=False)
    assert trainshort("track", "copy", str(run_dir), *options).out == f"{run_dir}: copied 2 records to {options[1]}\n"


LOSSES = [(step, 5 - step / 10 + (step > 5)) for step in range(1, 11)]


def test_tensorboard_shows_each_step_once(tmp_path: Path, trainshort: Call) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    run_dir = make_run(tmp_path / "my", checkpoints=(5, 10))
    train(run_dir, trainshort, "--to", "tensorboard")
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    curve = shown.Scalars("my/tensorboard", "train/loss")
    assert [(event.step, event.value) for event in curve] == [(step, pytest.approx(loss)) for step, loss in LOSSES]
    assert [event.step for event in shown.Scalars("my/tensorboard", "validation/loss")] == [5, 10]
    perplexity = shown.Scalars("my/tensorboard/evaluation", "evaluation/held-out/nonoverlapping/32/perplexity")
    assert [(event.step, event.value) for event in perplexity] == [(5, 30.0), (10, 21.0)]
    (text,) = shown.Tensors("my/tensorboard", "run file/text_summary")[-1].tensor_proto.string_val
    assert b"sequence_length: 32" in text


@pytest.mark.parametrize("limit", [500, 2500])  # bytes: of the steps, of the evaluations
def test_a_full_disk_under_tensorboard_is_said(
    tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    told = list[object]()
    monkeypatch.setattr(threading, "excepthook", told.append)
    run_dir, before = make_run(tmp_path / "my", steps=3), resource.getrlimit(resource.RLIMIT_FSIZE)
    add_report(run_dir, {length: 21.0 for length in range(32, 96)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        answer = trainshort("track", "copy", str(run_dir), "--to", "tensorboard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (answer.code, told) == (3, []), "TensorBoard's thread prints nothing"
    place = run_dir / "tensorboard"
    assert answer.error.endswith("(File too large): free space or fix permissions, and run the command again\n")
    assert answer.error.startswith(f"error: {run_dir} cannot be copied to {place}")
    assert trainshort("track", "copy", str(run_dir), "--to", "tensorboard").out.endswith(
        "copied 4 records to tensorboard\n"
    )


def test_wandb_continues_one_run(tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = make_run(tmp_path / "my", checkpoints=(5, 10))
    train(run_dir, trainshort, "--to", "wandb", "--project", "mine")
    runs, losses, perplexities = set(), [], []
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    wait_until_ended(files[-1])
    for file in files:
        for record in records(file):
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in values:
                losses.append((values["step"], values["train/loss"]))
            if "evaluation/held-out/nonoverlapping/32/perplexity" in values:
                perplexities.append((values["step"], values["evaluation/held-out/nonoverlapping/32/perplexity"]))
    assert runs == {(json.loads((run_dir / "wandb/copied.json").read_text())["run_id"], "mine", "my")}
    assert dict(losses) == {step: pytest.approx(loss) for step, loss in LOSSES}, "the last of each step"
    assert [step for step, _ in losses] == [*range(1, 9), *range(5, 11)]
    assert perplexities == [(5, 30.0), (10, 21.0)]


def test_wandb_gives_each_run_folder_its_run(tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dirs = [make_run(tmp_path / name, steps=steps) for name, steps in (("one", 3), ("two", 4))]
    assert trainshort("track", "copy", *map(str, run_dirs), "--to", "wandb").code == 0
    for run_dir, steps in zip(run_dirs, (3, 4), strict=True):
        (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
        wait_until_ended(file)
        assert {record.run.display_name for record in records(file) if record.HasField("run")} == {run_dir.name}
        assert sum(record.HasField("history") for record in records(file)) == steps


def wait_until_ended(file: Path) -> None:
    wait_until(lambda: any(record.HasField("exit") for record in records(file)), lambda: "not written")


def records(file: Path) -> list[Any]:
    """Return the records of wandb's own file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, found, parts = file.read_bytes(), _HEADER, [], b""
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)  # after a checksum
        parts += content[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def test_without_a_login_it_says_what_to_do(tmp_path: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.init", refuse)
    run_dir = make_run(tmp_path / "my")
    answer = trainshort("track", "copy", str(run_dir), "--to", "wandb")
    assert answer.code == 3
    assert answer.error == (
        "error: wandb begins no run (no API key configured): fix that; without a login, run `wandb login`, or set "
        "WANDB_MODE=offline and run `wandb sync` later\n"
    )


def refuse(**_: Any) -> None:
    from wandb.errors import UsageError

    raise UsageError("no API key configured")
