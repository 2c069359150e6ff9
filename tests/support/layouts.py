"""Train a few steps in several layouts on one set of ranks, all from the same saved state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_pre_hook

from configs.load import load_run
from configs.paths import run_folder
from configs.schema import RunConfig
from parallel.axes import Groups
from parallel.collectives import broadcast_from_first
from parallel.engine import Engine
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import ProcessRank
from tests.support.ranks import start_again
from tests.support.small_run import SMALL, Values, overrides_of, small_run
from training.build import build_engine
from training.checkpoint.manifest import SavedState
from training.checkpoint.rank_part import BackgroundWriter
from training.checkpoint.read import load_slices, open_checkpoint
from training.checkpoint.write import CheckpointWriter
from training.incarnation import Fence, begin_incarnation
from training.loss_scale import loss_scale
from training.model.attention import windows_of
from training.state import TrainState
from training.step_figures import FigureExchange, StepFigures
from training.stopping import StopRequest
from training.validator import Validator

CPU = torch.device("cpu")
VOCABULARY = 331  # prime: every tensor size above one pads
LENGTH = SMALL["data"]["sequence_length"]
LONG = 768  # more than the keys that the CPU's kernel takes in any case
DIFFERENCE: Values = {
    "model": {"init_std": 0.08, "embedding_init_std": 0.08},
    "data": {"vocab_size": VOCABULARY},
    "evaluate": {"every": 1, "samples": 3},
    "train": {"clip": 0.3},  # below the norms seen, so that wrong clipping shows in the losses
}


@dataclass(frozen=True)
class Trained:
    """Measurements of one rank in one layout.

    Attributes:
        rank, size: Rank on the tensor axis, and its size.
        stage: Pipeline stage.
        initial: This rank's slices of the initial weights, by name.
        steps: (loss, gradient norm) of each step.
        long_density: Share of the scores that a long step computed, over all ranks.
        logits: This rank's columns by length, [1, length, local_vocab]; None except on the last stage.
        held_out_loss: Mean loss at four times the training length.
        validation_losses: Mean losses of a validation at the training length and at three times it.
        wide_gradients: Share of the gradients that the optimizer was given, in the step with the fewest, that need more
            than 11 bits of mantissa: none of those that were rounded to bf16 or fp16, if they were not clipped.
    """

    rank: int
    size: int
    stage: int
    initial: dict[str, torch.Tensor]
    steps: list[tuple[float, float]]
    long_density: float | None
    logits: dict[int, torch.Tensor | None]
    held_out_loss: float
    validation_losses: list[float]
    wide_gradients: float


def config_of(layout: Mapping[str, object], *, run_dir: Path, more: tuple[str, ...] = ()) -> RunConfig:
    """Return the small run in one layout."""
    keys = [f"parallel.{key}={value}" for key, value in layout.items()]
    return load_run("demo", overrides=[*overrides_of(small_run(DIFFERENCE)), *keys, *more, f"run.dir={run_dir}"])


def build(config: RunConfig, *, world_size: int) -> tuple[Engine, Groups, Layout]:
    """Return the engine of a run, with the run's initial weights."""
    layout = Layout.of(config, world_size=world_size)
    groups = make_groups(layout)
    engine, _ = build_engine(config, layout=layout, groups=groups, vocab_size=VOCABULARY, device=torch.device("cpu"))
    return engine, groups, layout


def tokens_of(step: int, *, samples: int = 8, length: int = LENGTH) -> torch.Tensor:
    """Return the global batch of a step, [samples, length + 1]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (samples, length + 1), generator=generator)


class HeldOut:
    """Held-out samples of random tokens, without files."""

    sizes, weights, sequence_length = (5,), None, 3 * LENGTH

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return samples, [ids, 3 x LENGTH + 1]."""
        return tokens_of(98, samples=5, length=3 * LENGTH)[ids].numpy()


def train_layouts(
    process: ProcessRank,
    *,
    layouts: list[dict[str, Any]],
    steps: range,
    folder: Path,
    tokenizer: Path,
    start_from: Path | None,
    more: tuple[str, ...] = (),
    long: int | None = LONG,
) -> list[Trained]:
    """Train each layout in turn and save it to a run folder named after it; return this rank's measurements.

    Args:
        process: This process's rank.
        layouts: Keys of the `parallel` section.
        steps: The batches to train on.
        folder: Folder for the run folders.
        tokenizer: A sentencepiece model, for the checkpoints.
        start_from: A checkpoint to load first; None starts from the initial weights.
        more: Further overrides.
        long: Length of one more step, most of the work; None to leave it out.
    """
    trained = []
    for number, keys in enumerate(layouts):
        start_again(process, number=number)
        # 3 samples of a validation, and 9 pieces of them: no number of ranks and no micro-batch divides them
        lengths = f"evaluate.validation_lengths=[{3 * LENGTH}]"
        run_dir = folder / name_of(keys, ranks=process.world_size)
        config = config_of(keys, run_dir=run_dir, more=(*more, lengths))
        trained.append(train_one(process, config, steps=steps, tokenizer=tokenizer, start_from=start_from, long=long))
    return trained


def name_of(keys: Mapping[str, Any], *, ranks: int) -> str:
    """Return a layout's name: tensor 2, pipeline 1, ZeRO 3 on four ranks is t2p1z3w4; t2s if the sequence is split."""
    split, offloaded = "s" * bool(keys.get("sequence")), "-offload" if keys.get("offload") == "cpu" else ""
    return f"t{keys['tensor']}{split}p{keys['pipeline']}z{keys['zero']}w{ranks}{offloaded}"


def take_step(
    engine: Engine,
    samples: torch.Tensor,
    *,
    groups: Groups,
    layout: Layout,
    learning_rate: float,
    loss_scale: float | None = None,
    saving: bool = False,
) -> StepFigures:
    """Take a step on a global batch, [samples, length + 1], and return its figures as the trainer finds them."""
    fence = Fence(Path("a folder that does not exist"), token="1")
    windows = windows_of(engine.module)
    exchange = FigureExchange(
        groups=groups, device=CPU, stop=StopRequest(), fence=fence, windows=windows, is_saving=lambda: saving
    )
    began = exchange.begin()
    mine = samples.chunk(groups.data.size)[groups.data.rank]
    batches = list(mine.chunk(layout.micro_batches))
    outcome = engine.train_step(batches, learning_rate=learning_rate, loss_scale=loss_scale)
    return exchange.read(exchange.send(outcome, began=began))


def train_one(
    process: ProcessRank,
    config: RunConfig,
    *,
    steps: range,
    tokenizer: Path,
    start_from: Path | None,
    long: int | None = LONG,
) -> Trained:
    """Train one run and save it at the end; return this rank's measurements."""
    engine, groups, layout = build(config, world_size=process.world_size)
    state = engine.state()
    initial = {name: state.read(name, "weight").clone() for name in state.parameters}
    if start_from is not None:
        checkpoint = open_checkpoint(start_from)
        load_slices(state, checkpoint, kinds=state.kinds, groups=groups)
        state.set_step(checkpoint.step)
    scale = loss_scale(TrainState(0, 0), train=config.train)
    take = partial(take_step, engine, groups=groups, layout=layout, loss_scale=scale)
    with wide_gradients() as shares:
        taken = [take(tokens_of(step), learning_rate=3e-3) for step in steps]
    logits = {length: _logits(engine, length=length) for length in (LENGTH, 4 * LENGTH)}
    held_out = engine.mean_loss([tokens_of(99, samples=2, length=4 * LENGTH)])
    validation = Validator(engine, HeldOut(), config=config, data=groups.data).measure()  # type: ignore[arg-type]
    taken.append(take(tokens_of(steps[-1]), learning_rate=0.0))  # at the training length again
    save(engine, config, groups=groups, tokenizer=tokenizer, step=steps.stop)
    dist.barrier()
    density = None
    if long is not None:
        samples = tokens_of(97, samples=groups.data.size * layout.micro_batches, length=long)
        density = take(samples, learning_rate=0.0).attention_density
    return Trained(
        rank=groups.tensor.rank,
        size=groups.tensor.size,
        stage=groups.pipeline.rank,
        initial=initial,
        steps=[(figures.loss, figures.grad_norm) for figures in taken],
        long_density=density,
        logits=logits,
        held_out_loss=held_out,
        validation_losses=[validation.loss, *validation.by_length.values()],
        wide_gradients=min(shares),
    )


@contextmanager
def wide_gradients() -> Iterator[list[float]]:
    """Collect, at each step of an optimizer, the share of its gradients that need more than 11 bits of mantissa."""
    shares: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        mantissas = torch.cat([gradient.frexp().mantissa.flatten() for gradient in gradients]) * 2**11
        shares.append((mantissas != mantissas.round()).float().mean().item())

    hook = register_optimizer_step_pre_hook(look)
    yield shares
    hook.remove()


def _logits(engine: Engine, *, length: int) -> torch.Tensor | None:
    local = engine.local_logits(tokens_of(7, samples=1, length=length - 1))
    return None if local is None else local.clone()


def save(
    engine: Engine,
    config: RunConfig,
    *,
    groups: Groups,
    tokenizer: Path,
    step: int,
    background: BackgroundWriter | None = None,
) -> None:
    """Save the state after a step to the run folder, as a new start of the run."""
    fence = broadcast_from_first(lambda: begin(config), group=groups.world)
    saved = SavedState(step, step * config.train.global_batch, 0.0, "", None)
    writer = CheckpointWriter(config, groups, tokenizer, VOCABULARY, fence)
    writer.begin(engine.state(), saved, background=background).finish()


def whole_of(ranks: list[Trained], pick: str, key: str | int) -> torch.Tensor:
    """Join the tensor ranks' columns of logits, or rows of the embedding, and drop the padding."""
    parts = {r.rank: getattr(r, pick)[key] for r in ranks if getattr(r, pick).get(key) is not None}
    dim = -1 if pick == "logits" else 0
    return torch.cat([parts[rank] for rank in sorted(parts)], dim=dim).narrow(dim, 0, VOCABULARY)


def begin(config: RunConfig) -> Fence:
    """Begin a start of the run in its folder."""
    run_folder(config).mkdir(parents=True, exist_ok=True)
    return begin_incarnation(run_folder(config))
