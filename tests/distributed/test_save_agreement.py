"""What one rank meets while all save or resume, all know: none waits for ever, none goes on alone."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from configs.errors import InputError, TrainshortError
from parallel.collectives import broadcast_from_first
from parallel.start import ProcessRank
from parallel.zero import KINDS
from tests.support.disk import CountedOs, once
from tests.support.layouts import build, config_of, save
from tests.support.ranks import run_ranks
from training.checkpoint import disk
from training.checkpoint.manifest import check_whole, list_checkpoints
from training.checkpoint.read import Checkpoint, load_slices, open_together
from training.incarnation import Fence

RANKS = 2
OPERATIONS = {
    "a folder cannot be made": (0, 1),
    "a file cannot be opened on rank 0": (0, 2),
    "a file cannot be opened on rank 1": (1, 1),
    "a tensor cannot be written on rank 1": (1, 20),
    "a file cannot be synced on rank 1": (1, -2),
}


@dataclass(frozen=True)
class Seen:
    """What one rank saw: the error of each broken save, the counts of operations, what it opened."""

    errors: dict[str, str]
    opened: list[str]


def break_saves(place: ProcessRank, *, keys: dict[str, int], folder: Path) -> Seen:
    config = config_of(keys, run_dir=folder / "run")
    engine, groups, _ = build(config, world_size=place.world_size)
    arguments: dict[str, Any] = {"groups": groups, "tokenizer": folder / "tokenizer.model"}
    with patch.object(disk, "os", counted := CountedOs()):
        save(engine, config, **arguments, step=1)
    errors = {}
    for name, (rank, number) in OPERATIONS.items():
        number = number if number > 0 else len(counted.names) + number + 1
        fails = CountedOs(once(number)) if place.rank == rank else CountedOs()
        with patch.object(disk, "os", fails):
            errors[name] = _error_of(lambda: save(engine, config, **arguments, step=2))
    check, looks = Fence.check, []

    def overtaken(fence: Fence) -> None:
        looks.append(fence)
        if place.rank == 1:
            raise fence.superseded()
        check(fence)

    with patch.object(Fence, "check", overtaken):
        errors["rank 1 is overtaken"] = _error_of(lambda: save(engine, config, **arguments, step=2))
    save(engine, config, **arguments, step=2)
    require = Checkpoint.require

    def unfit(self: Checkpoint, *shards: Any, **kinds: Any) -> None:
        require(self, *shards, **kinds)
        if place.rank == 1:
            raise InputError("unfit for rank 1")

    checkpoint = open_together(folder / "run", kinds=KINDS, world=groups.world)
    with patch.object(Checkpoint, "require", unfit):
        errors["rank 1 cannot load"] = _error_of(
            lambda: load_slices(engine.state(), checkpoint, kinds=KINDS, groups=groups)
        )
    errors["rank 0 has no disk"] = _error_of(lambda: broadcast_from_first(_no_disk, group=groups.world))
    opened = [_opened(folder / "run", groups)]
    # The last file in the order of names is rank 1's to check.
    last = max(list_checkpoints(folder / "run")[-1].path.iterdir())
    if place.rank == 0:
        content = bytearray(last.read_bytes())
        content[-1] ^= 1
        last.write_bytes(content)
    opened.append(_opened(folder / "run", groups))
    return Seen(errors, opened)


def _no_disk() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/run")


def _error_of(action: Any) -> str:
    try:
        action()
    except TrainshortError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _opened(run_dir: Path, groups: Any) -> str:
    try:
        return open_together(run_dir, kinds=KINDS, world=groups.world).path.name
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("keys", [{"tensor": 2, "pipeline": 1, "zero": 1}, {"tensor": 1, "pipeline": 1, "zero": 3}])
def test_what_one_rank_meets_all_ranks_know(tmp_path: Path, keys: dict[str, int]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no test here reads it")
    one, two = run_ranks(break_saves, ranks=RANKS, arguments={"keys": keys, "folder": tmp_path})
    assert one.errors == two.errors
    for name in OPERATIONS:
        assert one.errors[name].startswith(f"SaveError: {tmp_path}/run/checkpoints/"), name
        assert one.errors[name].endswith("was not saved (Input/output error): free space, or mend the disk"), name
    assert one.errors["rank 1 is overtaken"].startswith("Superseded: ")
    assert one.errors["rank 1 cannot load"] == "InputError: unfit for rank 1"
    assert one.errors["rank 0 has no disk"] == (
        "MachineError: rank 0 cannot use the disk (Input/output error /run): mend it and start again"
    )
    assert one.opened == two.opened == ["step_0000002", "step_0000001"]
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step_0000001", "step_0000002"]
    assert check_whole(tmp_path / "run" / "checkpoints" / "step_0000001").step == 1
