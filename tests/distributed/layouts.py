"""Train a few steps in several layouts on one set of ranks."""

from typing import Any

import torch
import torch.distributed as dist

from configs.load import load_run
from configs.schema import RunConfig
from parallel.engine import Engine, make_engine
from parallel.groups import Groups, make_groups
from parallel.layout import Layout
from parallel.pipeline import StagedModule
from parallel.seeds import initial_weights
from parallel.start import Place
from training.model.decoder import Decoder, plan_layers

SHAPE = ["model.layers=4", "model.hidden=64", "model.heads=4", "data.sequence_length=32", "train.clip=0.3"]
BATCH = ["train.global_batch=8", "train.micro_batch=2", "model.init_std=0.08"]
VOCABULARY = 301  # odd: every tensor size pads


def config_of(layout: dict[str, int], *, more: tuple[str, ...] = ()) -> RunConfig:
    """Return the small run in one layout."""
    keys = [f"parallel.{key}={value}" for key, value in layout.items()]
    return load_run("demo", overrides=[*SHAPE, *BATCH, *keys, *more])


def build(config: RunConfig, *, world_size: int) -> tuple[Engine, Groups, Layout]:
    """Return the engine of a run, with the run's initial weights."""
    layout = Layout.of(config, world_size=world_size)
    groups = make_groups(layout)
    plan = plan_layers(config.model, vocab_size=VOCABULARY, tensor=groups.tensor, recompute=config.train.recompute)
    module = StagedModule(plan, groups=groups) if layout.pipeline > 1 else Decoder(plan)
    initial_weights(module, seed=config.run.seed, tensor=groups.tensor)
    engine = make_engine(module, plan, train=config.train, layout=layout, groups=groups)
    return engine, groups, layout


def tokens_of(step: int, *, samples: int = 8, length: int = 33) -> torch.Tensor:
    """Return the global batch of a step, [samples, length]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)


def micro_batches_of(batch: torch.Tensor, *, groups: Groups, layout: Layout) -> list[torch.Tensor]:
    """Return a data rank's share of a global batch."""
    mine = batch.chunk(groups.data.size)[groups.data.rank]
    return list(mine.chunk(layout.micro_batches))


def train_layouts(place: Place, *, layouts: list[dict[str, int]], steps: int, more: tuple[str, ...] = ()) -> Any:
    """Return for each layout the (loss, gradient norm) of each step, as seen by this rank."""
    found = []
    for overrides in layouts:
        engine, groups, layout = build(config_of(overrides, more=more), world_size=place.size)
        outcomes = []
        for step in range(steps):
            batches = micro_batches_of(tokens_of(step), groups=groups, layout=layout)
            outcomes.append(engine.train_step(batches, learning_rate=3e-3))
        found.append([(outcome.loss, outcome.grad_norm) for outcome in outcomes])
        dist.barrier()
    return found
