"""A small run of one rank in the test's own process: built once, started as often as a test needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from configs.load import load_run
from configs.paths import data_folder, run_folder
from configs.schema import RunConfig
from data_pipeline.counts import load_trainable
from data_pipeline.loader import Loader
from data_pipeline.manifest import Prepared
from data_pipeline.prepare import prepare_data
from data_pipeline.samples import Samples, open_samples
from parallel.axes import Groups
from parallel.engine import Engine
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import start_alone
from tests.support.data import BOOK
from tests.support.small_run import TINY, overrides_of, small_run
from training import folder, utilization
from training.build import build_engine
from training.folder import claim_run_folder
from training.metrics_file import MetricsFile
from training.preflight import Ready
from training.resume import has_checkpoint
from training.state import TrainState
from training.stopping import StopRequest
from training.trainer import Trainer, build_trainer

STEPS = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class OneRank:
    """State shared by all starts: the engine, whose weights every start sets again, and the data."""

    overrides: list[str]
    prepared: Prepared
    engine: Engine
    groups: Groups
    initial: dict[str, Tensor]

    def config(self, run_dir: Path, *more: str) -> RunConfig:
        """Return the run in a folder."""
        return load_run("demo", overrides=[*self.overrides, f"run.dir={run_dir}", *more])

    def start(self, run_dir: Path, *more: str, steps: int = STEPS, accept_change: bool = False) -> TrainState:
        """Train as one start of `trainshort train` would, from the newest checkpoint if there is one."""
        config = self.config(run_dir, f"train.steps={steps}", f"train.decay_steps={STEPS}", *more)
        trainer = self.trainer(config, accept_change=accept_change)
        trainer.run([MetricsFile(run_dir, last_step=trainer.start.step)])
        return trainer.start

    def trainer(self, config: RunConfig, *, accept_change: bool = False) -> Trainer:
        """Return the trainer of a new start, resumed from the newest checkpoint if there is one."""
        self._reset_engine()
        layout = Layout.of(config, world_size=1)
        return build_trainer(
            Ready(config, run_folder(config), layout, self.prepared, newest=None),
            engine=self.engine,
            groups=self.groups,
            fence=claim_run_folder(config, layout=layout, device=CPU),
            device=CPU,
            stop=StopRequest(),
            resumes=has_checkpoint(config, world=self.groups.world),
            accept_change=accept_change,
        )

    def samples(self, config: RunConfig) -> Samples:
        """Return the training samples of a run."""
        data = config.data
        return open_samples(
            self.prepared, sequence_length=data.sequence_length, split=data.split, seed=config.run.seed, held_out=False
        )

    def loader(self, config: RunConfig, *, samples: Samples | None = None) -> Loader:
        """Return the loader of a run, for its own samples or for others."""
        return Loader(
            samples or self.samples(config),
            seed=config.run.seed,
            micro_batch=config.train.micro_batch,
            data_rank=0,
            data_size=1,
        )

    def _reset_engine(self) -> None:
        state = self.engine.state()
        for name, weight in self.initial.items():
            state.write(name, "weight", weight)
            for kind in state.kinds_of(name)[1:]:
                state.write(name, kind, torch.zeros_like(weight))
        state.set_step(0)


@contextmanager
def one_rank(home: Path, *more: str) -> Iterator[OneRank]:
    """Prepare the data and build the engine.

    Args:
        home: An empty folder.
        more: Further overrides.
    """
    if not (home / "book.txt").exists():  # another process may have prepared it
        (home / "book.txt").write_text(BOOK, encoding="utf-8")
    overrides = [
        *overrides_of(small_run(TINY)),
        f"data.sources=[{home / 'book.txt'}]",
        f"data.dir={home / 'data'}",
        *more,
    ]
    config = load_run("demo", overrides=[*overrides, f"run.dir={home / 'unused'}"])
    prepare_data(config.data, folder=data_folder(config), progress=False)
    prepared = load_trainable(config, folder=data_folder(config))
    with one_thread(), asked_once():
        engine, groups = engine_of(config, vocab_size=prepared.vocab_size)
        state = engine.state()
        initial = {name: state.read(name, "weight").clone() for name in state.parameters}
        yield OneRank(overrides, prepared, engine, groups, initial)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: more threads slow such a small model down, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def asked_once() -> Iterator[None]:
    """Measure this machine, and ask git for the code, once: at each start they take longer than such a run's steps."""
    with (
        patch.object(utilization, "measured_gemm", cache(utilization.measured_gemm)),
        patch.object(folder, "source_code", cache(folder.source_code)),
    ):
        yield


def engine_of(config: RunConfig, *, vocab_size: int) -> tuple[Engine, Groups]:
    """Return the engine of a run of one rank in this process, and its groups."""
    os.environ.setdefault("LOCAL_RANK", "0")  # `start` sets it for a rank; DeepSpeed asks for it
    device, layout = start_alone(), Layout.of(config, world_size=1)
    groups = make_groups(layout)
    engine, _ = build_engine(config, layout=layout, groups=groups, vocab_size=vocab_size, device=device)
    return engine, groups
