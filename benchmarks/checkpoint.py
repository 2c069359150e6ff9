"""Time saving and loading a checkpoint on one rank against a plain copy of its files. Prints one JSON line.

The plain copy reads from the page cache and waits for the disk, as a save does, but neither hashes nor gathers.
torch.distributed.checkpoint saves the same tensors. Compare ratios between machines, not seconds.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed.checkpoint as dcp

from benchmarks.machine import print_result
from configs.load import load_run
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import ProcessRank, start, stop
from training.build import build_engine
from training.checkpoint.manifest import SavedState, check_whole
from training.checkpoint.rank_part import BackgroundWriter
from training.checkpoint.read import load_slices, open_on_all_ranks
from training.checkpoint.write import BegunSave, CheckpointWriter
from training.incarnation import begin_incarnation

VOCABULARY = 8192
SHAPE = ["model.layers=6", "model.hidden=768", "model.heads=12", f"data.vocab_size={VOCABULARY}"]
ALONE = ["parallel.tensor=1", "parallel.pipeline=1"]
ROUNDS = 3
CHUNK = 1 << 23


def main() -> None:
    """Time each operation; report the fastest of several rounds."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as home:  # not /tmp, which may be in memory
        run_dir = Path(home) / "run"
        run_dir.mkdir()
        config = load_run("demo", overrides=[*SHAPE, *ALONE, f"run.dir={run_dir}"])
        device = start(
            ProcessRank(rank=0, world_size=1, local_rank=0, rendezvous=f"file://{home}/meet", starter="local")
        )
        layout = Layout.of(config, world_size=1)
        groups = make_groups(layout)
        engine, _ = build_engine(config, layout=layout, groups=groups, vocab_size=VOCABULARY, device=device)
        state, fence = engine.state(), begin_incarnation(run_dir)
        tokenizer = Path(home) / "tokenizer.model"
        tokenizer.write_bytes(b"nothing here reads it")

        writer = CheckpointWriter(config, groups, tokenizer, VOCABULARY, fence)
        saved, background = SavedState(1, 16, 0.0, "", None), BackgroundWriter()
        begin = partial(writer.begin, state, saved, background=background)

        def save() -> Path:
            return writer.begin(state, saved).finish()

        def load() -> None:
            opened = open_on_all_ranks(run_dir, kinds=state.kinds, world=groups.world)
            load_slices(state, opened, kinds=state.kinds, groups=groups)

        def save_by_torch() -> None:
            tensors = {
                f"{name}.{kind}": state.read(name, kind) for name in state.parameters for kind in state.kinds_of(name)
            }
            dcp.save(tensors, checkpoint_id=Path(home) / "torch", no_dist=True)
            for file in (Path(home) / "torch").iterdir():
                _sync(file)

        seconds = {"save": _fastest(save)}
        folder = save()
        seconds |= {
            "wait_in_background": min(_wait_for(begin) for _ in range(ROUNDS)),
            "load": _fastest(load),
            "verify": _fastest(lambda: check_whole(folder)),
            "plain_copy": _fastest(lambda: _copy(folder, Path(home) / "copy")),
            "torch_save": _fastest(save_by_torch),
        }
        size = sum(file.stat().st_size for file in folder.iterdir())
        parameters = sum(parameter.numel() for parameter, _ in state.parameters.values())
        stop()
    print_result(
        "checkpoint",
        parameters=parameters,
        bytes_per_parameter=round(size / parameters, 3),
        of_16_bytes=round(size / parameters / 16, 3),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        megabytes_per_second={name: round(size / value / 1e6) for name, value in seconds.items()},
        save_against_plain_copy=round(seconds["save"] / seconds["plain_copy"], 2),
    )


def _wait_for(begin: Callable[[], BegunSave]) -> float:
    """Return how long training would wait for a save in the background: at its begin and at its end."""
    began = time.perf_counter()
    begun = begin()
    waited = time.perf_counter() - began
    while not begun.is_written:
        time.sleep(0.01)
    began = time.perf_counter()
    begun.finish()
    return waited + time.perf_counter() - began


def _fastest(action: Callable[[], object]) -> float:
    fastest = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        action()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _copy(folder: Path, new: Path) -> None:
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for file in folder.iterdir():
        with file.open("rb") as source, (new / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
        _sync(new / file.name)


def _sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


if __name__ == "__main__":
    main()
