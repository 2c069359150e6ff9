"""A tiny run of one rank inside the test's process: built once, started as often as a test likes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.load import load_run
from configs.paths import data_folder, run_folder
from configs.schema import RunConfig
from data_pipeline.counts import load_trainable
from data_pipeline.loader import Loader
from data_pipeline.manifest import Prepared
from data_pipeline.prepare import prepare_data
from data_pipeline.samples import open_samples
from parallel.axes import Groups
from parallel.engine import Engine
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import start_alone
from parallel.zero import KINDS
from tests.support.data import BOOK
from training import folder, run
from training.loop import Loop, TrainState
from training.observers import MetricsFile
from training.stopping import StopRequest

OVERRIDES = [
    "model.layers=1",
    "model.hidden=16",
    "model.heads=2",
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "data.vocab_size=400",
    "data.sequence_length=8",
    "data.split=0",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.warmup_steps=1",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "evaluate.every=0",
]
STEPS = 4


@dataclass(frozen=True)
class OneRank:
    """What stays between starts: the engine, which every start fills anew, and the data."""

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
        self._forget()
        fence = folder.claim_run_folder(config, layout=Layout.of(config, world_size=1), device=torch.device("cpu"))
        loader = self.loader(config)
        position = run._resume(self.engine, loader, config=config, groups=self.groups, accept_change=accept_change)
        save = run._saver(
            self.engine,
            loader,
            config=config,
            prepared=self.prepared,
            groups=self.groups,
            fence=fence,
            start=position,
        )
        loop = Loop(
            config=config,
            engine=self.engine,
            loader=loader,
            groups=self.groups,
            device=torch.device("cpu"),
            observers=[MetricsFile(run_dir, last_step=position.step)],
            validate=lambda: 0.0,
            save=save,
            stop=StopRequest(),
            fence=fence,
            flops_per_token=1.0,
            peak_flops=None,
        )
        run._run(loop, start=position)
        return position

    def loader(self, config: RunConfig) -> Loader:
        """Return the samples of a run."""
        data, train = config.data, config.train
        samples = open_samples(
            self.prepared, sequence_length=data.sequence_length, split=data.split, seed=config.run.seed, held_out=False
        )
        return Loader(
            samples,
            seed=config.run.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            data_rank=0,
            data_size=1,
        )

    def _forget(self) -> None:
        state = self.engine.state()
        for name, weight in self.initial.items():
            state.write(name, "weight", weight)
            for kind in KINDS[1:]:
                state.write(name, kind, torch.zeros_like(weight))
        state.set_step(0)


@contextmanager
def one_rank(home: Path) -> Iterator[OneRank]:
    """Prepare the data and build the engine.

    Args:
        home: An empty folder.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so tiny a model is slowed by more, the more so on a busy machine
    yield _make(home)
    torch.set_num_threads(threads)


def _make(home: Path) -> OneRank:
    if not (home / "book.txt").exists():  # another process may have prepared it
        (home / "book.txt").write_text(BOOK, encoding="utf-8")
    overrides = [*OVERRIDES, f"data.sources=[{home / 'book.txt'}]", f"data.dir={home / 'data'}"]
    config = load_run("demo", overrides=[*overrides, f"run.dir={home / 'unused'}"])
    prepare_data(config.data, folder=data_folder(config), progress=False)
    prepared = load_trainable(config.data, folder=data_folder(config), validates=False)
    os.environ.setdefault("LOCAL_RANK", "0")  # what `start` does for a rank; DeepSpeed asks for it
    device = start_alone()
    layout = Layout.of(config, world_size=1)
    groups = make_groups(layout)
    engine, _ = run.build_engine(config, layout=layout, groups=groups, vocab_size=prepared.vocab_size, device=device)
    state = engine.state()
    initial = {name: state.read(name, "weight").clone() for name in state.parameters}
    shutil.rmtree(run_folder(config), ignore_errors=True)
    return OneRank(overrides, prepared, engine, groups, initial)
