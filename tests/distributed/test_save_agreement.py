"""An error on one rank during a save or a resume is raised on all: no rank hangs or continues alone."""

import errno
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from configs.choices import OPTIMIZERS
from configs.errors import InputError, TrainshortError
from configs.schema import RunConfig
from parallel.collectives import broadcast_from_first
from parallel.engine import Engine
from parallel.parameter import Shard
from parallel.start import COLLECTIVE_TIMEOUT, ProcessRank
from tests.support.disk import OnOperation, counted_operations, once
from tests.support.layouts import build, config_of, save, take_step, tokens_of
from tests.support.processes import PATIENCE_SECONDS
from tests.support.ranks import run_ranks
from training.checkpoint import rank_part
from training.checkpoint.manifest import check_whole, list_checkpoints
from training.checkpoint.rank_part import BackgroundWriter
from training.checkpoint.read import Checkpoint, load_slices, open_on_all_ranks
from training.incarnation import Fence

RANKS = 2
OPERATIONS = {
    "a folder cannot be made": (0, 1),
    "a file cannot be opened on rank 0": (0, 2),
    "a file cannot be opened on rank 1": (1, 1),
    "a tensor cannot be written on rank 1": (1, 20),
    "a file cannot be synced on rank 1": (1, -2),
}
SHORT_TIMEOUT, SLOW_SECONDS = timedelta(seconds=4), 6

KINDS = OPTIMIZERS["adamw"].state_kinds


@dataclass(frozen=True)
class Errors:
    """Observations of one rank: the error of each broken save, and the checkpoint that each resume opened.

    `saving` is whether a step found that a rank still writes: where none does, and where rank 1 does. `hashes` are
    those of the files of one state, saved at once and in the background during a step. `slow_seconds` is the time of a
    save and a load on slow disks.
    """

    by_name: dict[str, str]
    opened: list[str]
    saving: list[bool]
    hashes: list[dict[str, str]]
    slow_seconds: float | None


def break_saves(process: ProcessRank, *, keys: dict[str, int], folder: Path) -> Errors:
    config = config_of(keys, run_dir=folder / "run")
    engine, groups, layout = build(config, world_size=process.world_size)
    arguments: dict[str, Any] = {"groups": groups, "tokenizer": folder / "tokenizer.model"}
    with counted_operations() as names:
        save(engine, config, **arguments, step=1)
    errors, background = {}, BackgroundWriter()
    for name, (rank, number) in OPERATIONS.items():
        number = number if number > 0 else len(names) + number + 1
        for writer, how in ((None, ""), (background, " in the background")):
            with counted_operations(once(number)) if process.rank == rank else nullcontext():
                again = partial(save, engine, config, **arguments, step=2, background=writer)
                errors[f"{name}{how}"] = _error_of(again)
    check = Fence.check

    def overtaken(fence: Fence) -> None:
        if process.rank == 1:
            raise fence.superseded()
        check(fence)

    with patch.object(Fence, "check", overtaken):
        errors["rank 1 is overtaken"] = _error_of(lambda: save(engine, config, **arguments, step=2))
    save(engine, config, **arguments, step=2, background=background)
    require = Checkpoint.require

    def unfit(self: Checkpoint, *shards: Any, **kinds: Any) -> None:
        require(self, *shards, **kinds)
        if process.rank == 1:
            raise InputError("unfit for rank 1")

    checkpoint = open_on_all_ranks(folder / "run", kinds=KINDS, world=groups.world)
    with patch.object(Checkpoint, "require", unfit):
        errors["rank 1 cannot load"] = _error_of(
            lambda: load_slices(engine.state(), checkpoint, kinds=KINDS, groups=groups)
        )
    errors["rank 0 has no disk"] = _error_of(lambda: broadcast_from_first(_no_disk, group=groups.world))
    opened = [_opened(folder / "run", groups)]
    if process.rank == 0:
        _alter(folder / "run")
    opened.append(_opened(folder / "run", groups))
    # Only these ranks gather what they save: with one data rank no collective stands between two writes.
    slow_seconds = on_slow_disks(process, engine, config, **arguments) if groups.data.size > 1 else None
    step = partial(take_step, engine, tokens_of(1), groups=groups, layout=layout, learning_rate=1e-3)
    saving = [step(saving=writes).saving for writes in (False, process.rank == 1)]
    hashes = saved_twice(config, partial(save, engine, **arguments), train=step)
    return Errors(errors, opened, saving, hashes, slow_seconds)


def saved_twice(config: RunConfig, save_state: Any, *, train: Any) -> list[dict[str, str]]:
    """Save a state at once, and in the background while a step is taken; return the hashes of the files of both."""
    folder, hashes, trained = Path(config.run.dir).with_name("twice"), [], threading.Event()
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
    training = threading.get_ident()

    def hold(number: int, name: str) -> None:
        if threading.get_ident() != training:
            assert trained.wait(PATIENCE_SECONDS)

    class Training(BackgroundWriter):
        def start(self, write: Any) -> Any:
            part = super().start(write)
            train()
            trained.set()
            return part

    for number, background in enumerate((None, Training()), start=1):
        with counted_operations(hold):
            save_state(config, step=number, background=background)
        files = check_whole(list_checkpoints(folder)[-1].path).files
        hashes.append({name: file.sha256 for name, file in files.items() if name.endswith("safetensors")})
    return hashes


def on_slow_disks(process: ProcessRank, engine: Engine, config: RunConfig, **arguments: Any) -> float:
    """Save and load with disks slower than the collectives' timeout; return how long it took."""
    with counted_operations() as names:
        save(engine, config, **arguments, step=3)
    # Rank 0 is slow to rename, when the others have nothing left to do; rank 1 to write a tensor, between two reads.
    slow = names.index("rename") + 1 if process.rank == 0 else len(names) // 2
    checkpoint = open_on_all_ranks(Path(config.run.dir), kinds=KINDS, world=arguments["groups"].world)
    read = Checkpoint.slice

    def read_slowly(self: Checkpoint, shard: Shard, **part: Any) -> Any:
        if process.rank == 1 and shard.name == "embedding.word.weight":
            time.sleep(SLOW_SECONDS)
        return read(self, shard, **part)

    began = time.monotonic()
    _set_timeout(SHORT_TIMEOUT)
    with patch.object(rank_part, "CHUNK_VALUES", 1000), counted_operations(_slow_at(slow)):
        save(engine, config, **arguments, step=4)
    with patch.object(Checkpoint, "slice", read_slowly):
        load_slices(engine.state(), checkpoint, kinds=("weight",), groups=arguments["groups"])
    dist.barrier()
    _set_timeout(COLLECTIVE_TIMEOUT)
    return time.monotonic() - began


def _slow_at(number: int) -> OnOperation:
    return lambda seen, name: time.sleep(SLOW_SECONDS if seen == number else 0)


def _set_timeout(timeout: timedelta) -> None:
    for group in dist.distributed_c10d._world.pg_map:
        group.set_timeout(timeout)


def _no_disk() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/run")


def _error_of(action: Any) -> str:
    try:
        action()
    except TrainshortError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _alter(run_dir: Path) -> None:
    """Change a byte of the newest checkpoint, in the last file in the order of names: rank 1 checks it."""
    last = max(list_checkpoints(run_dir)[-1].path.iterdir())
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)


def _opened(run_dir: Path, groups: Any) -> str:
    try:
        return open_on_all_ranks(run_dir, kinds=KINDS, world=groups.world).path.name
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("keys", [{"tensor": 2, "pipeline": 1, "zero": 1}, {"tensor": 1, "pipeline": 1, "zero": 3}])
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, keys: dict[str, int]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no test here reads it")
    one, two = run_ranks(break_saves, ranks=RANKS, arguments={"keys": keys, "folder": tmp_path})
    assert one.by_name == two.by_name
    for name in [*OPERATIONS, *(f"{name} in the background" for name in OPERATIONS)]:
        assert one.by_name[name].startswith(f"SaveError: {tmp_path}/run/checkpoints/"), name
        assert one.by_name[name].endswith("was not saved (Input/output error): free space, or fix the disk"), name
    at_once, in_the_background = one.hashes
    assert len(at_once) == len(KINDS) * keys["tensor"]
    assert at_once == in_the_background
    assert one.saving == two.saving == [False, True], "first no rank writes, then one of the two"
    assert one.by_name["rank 1 is overtaken"].startswith("Superseded: ")
    assert one.by_name["rank 1 cannot load"] == "InputError: unfit for rank 1"
    assert one.by_name["rank 0 has no disk"] == (
        "MachineError: rank 0 cannot use the disk (Input/output error /run): fix it and start again"
    )
    assert one.opened == two.opened == ["step_0000002", "step_0000001"]
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    saved = [1, 2] if one.slow_seconds is None else [2, 3, 4]  # three are kept
    assert left == [f"step_000000{step}" for step in saved]
    whole = 1 if one.slow_seconds is None else 4  # the second was altered
    assert check_whole(tmp_path / "run" / "checkpoints" / f"step_000000{whole}").step == whole
    if one.slow_seconds is not None:
        assert one.slow_seconds > 3 * SLOW_SECONDS, "a disk was not slow"
