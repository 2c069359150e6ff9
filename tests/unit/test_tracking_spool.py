"""The spool: events survive torn lines, full disks and several writers, and files go once they are sent."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.paths import logs_folder, spool_folder
from tests.support.run_folders import make_run, start_run
from training.tracking import spool
from training.tracking.ending import ending_of
from training.tracking.spool import (
    SentPositions,
    SpoolPosition,
    SpoolWriter,
    is_closed,
    read_events,
    remove_kept_file,
    sole_sender,
    spool_files,
)


class Problems:
    """What a writer complains of."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, problem: str) -> None:
        self.said.append(problem)


def writer_of(run_dir: Path, *, role: str = "train", on_problem: Problems | None = None) -> SpoolWriter:
    return SpoolWriter(run_dir, role=role, on_problem=on_problem or Problems())


def events(file: Path, position: SpoolPosition | None = None) -> list[Any]:
    return [event["x"] for event, _ in read_events(file, position or SpoolPosition())]


def test_a_torn_line_is_left_and_a_damaged_one_skipped(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    for x in (1, 2):
        writer.put({"kind": "a", "x": x})
    [file] = spool_files(tmp_path)
    text = file.read_bytes()
    file.write_bytes(text + b'\0\0{"n": 3\n[]\n' + text.replace(b'"n": 1', b'"n": 3')[:-3])
    assert events(file) == [1, 2, 1]
    [*_, (_, behind)] = read_events(file, SpoolPosition())
    assert behind.number == 3
    assert events(file, behind) == []
    with file.open("ab") as handle:
        handle.write(b'}\n{"n": 5, "kind": "a", "x": 9}\n')  # the rest of the torn line, and another
    assert events(file, behind) == [9]
    assert list(read_events(tmp_path / "missing", SpoolPosition())) == []


def test_a_file_that_is_full_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "ROTATE_BYTES", 200)
    writer = writer_of(tmp_path)
    for x in range(20):
        writer.put({"kind": "a", "x": x})
    files = spool_files(tmp_path)
    assert len(files) == 3
    assert [x for file in files for x in events(file)] == [*range(20)]
    assert [is_closed(file) for file in files] == [True] * (len(files) - 1) + [False]
    assert files[-1] == writer.file
    writer.close()
    writer.put({"kind": "a", "x": 20})  # ignored
    assert is_closed(files[-1])
    assert [x for file in files for x in events(file)] == [*range(20)]


def test_files_are_in_the_order_of_the_starts(tmp_path: Path) -> None:
    for number in (2, 10, 9):
        values = {"token": "x", "host": "h", "machine": "m", "pid": 1, "process_started": 1, "started_at": ""}
        (tmp_path / "incarnation").write_text(json.dumps({"number": number, **values}))
        writer_of(tmp_path).put({"kind": "a", "x": number})
    assert [events(file) for file in spool_files(tmp_path)] == [[2], [9], [10]]


def test_a_full_disk_keeps_events_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = Problems()
    writer = writer_of(tmp_path, on_problem=problems)
    writer.put({"kind": "a", "x": 1})
    real, is_full = os.write, True

    def write(handle: int, data: bytes) -> int:
        if not is_full:
            return real(handle, data)
        real(handle, data[:7])  # a part of a line
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(spool, "RETRY_WRITE_SECONDS", 0.0)
    for x in (2, 3, 4):
        writer.put({"kind": "a", "x": x})
    assert [event["x"] for event in writer.waiting()] == [2, 3, 4]
    assert len(problems.said) == 1
    assert "(No space left on device): records wait in memory" in problems.said[0]
    writer.forget(2)  # that one was sent from memory
    is_full = False
    writer.put({"kind": "a", "x": 5})
    assert writer.waiting() == []
    [file] = spool_files(tmp_path)
    assert events(file) == [1, 3, 4, 5]
    is_full = True
    monkeypatch.setattr(spool, "MOST_IN_MEMORY", 3)
    for x in range(6, 20):
        writer.put({"kind": "a", "x": x})
    assert [event["x"] for event in writer.waiting()] == [6, 7, 8]
    assert "further ones are dropped" in problems.said[-1]
    writer.close()


def test_a_run_folder_that_is_gone_is_survived(tmp_path: Path) -> None:
    problems = Problems()
    writer = writer_of(tmp_path / "gone", on_problem=problems)
    writer.put({"kind": "a", "x": 1})
    assert writer.keep_file(tmp_path / "missing") == tmp_path / "missing"
    writer.flush()
    writer.show_life()
    assert [event["x"] for event in writer.waiting()] == [1]
    assert len(problems.said) == 1
    writer.close()
    assert not (tmp_path / "gone").exists()


def test_a_copied_file_outlives_its_replacement(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("first")
    kept = writer_of(tmp_path).keep_file(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("second")
    assert (kept.name, kept.read_text()) == ("report.json", "first")
    remove_kept_file(tmp_path / "report.json", run_dir=tmp_path)
    remove_kept_file(kept, run_dir=tmp_path)
    assert (tmp_path / "report.json").exists()
    assert list((spool_folder(tmp_path) / "files").iterdir()) == []


def test_positions_are_kept_and_another_senders_are_noticed(tmp_path: Path) -> None:
    spool_folder(tmp_path).mkdir()
    ours, other = SentPositions(tmp_path), SentPositions(tmp_path)
    assert not ours.read()
    ours.set("a", SpoolPosition(3, 40), lane="log")
    ours.save()
    assert not ours.read()
    assert other.read()
    assert other.of("a", lane="log") == SpoolPosition(3, 40)
    assert other.of("a", lane="files") == SpoolPosition()
    other.set("a", SpoolPosition(5, 70), lane="log")
    other.save()
    assert ours.read()
    assert ours.of("a", lane="log").number == 5
    ours.forget("a")
    ours.save()
    (spool_folder(tmp_path) / "sent.json").write_text("{")
    assert not ours.read()


def test_one_process_sends_at_a_time(tmp_path: Path) -> None:
    spool_folder(tmp_path).mkdir()
    with sole_sender(tmp_path) as first:
        with sole_sender(tmp_path) as second:
            assert (first, second) == (True, False)
    with sole_sender(tmp_path) as third:
        assert third


@pytest.mark.parametrize(
    ("log", "status"),
    [
        ("step 1/10", "KILLED"),
        ("error: a\nstep 1/10", "KILLED"),
        ("error: a", "FAILED"),
        ("error: rank 1 ran out of memory\n  held: 2 GB\n  limit: 3 GB", "FAILED"),
        ("Traceback (most recent call last):\n  File a\n" + "    b()\n" * 2000 + "ValueError: c", "FAILED"),
    ],
)
def test_a_dead_run_has_failed_if_its_last_word_is_an_error(tmp_path: Path, log: str, status: str) -> None:
    run_dir = start_run(make_run(tmp_path / "run"), process_started=1)
    logs_folder(run_dir).mkdir()
    (logs_folder(run_dir) / "rank_0.log").write_text("error: of another rank\nto continue: x\n")
    (logs_folder(run_dir) / "rank_1.log").write_text(f"step 1/10\n{log}\n")
    ending = ending_of(run_dir)
    assert ending is not None
    assert ending.status == status
