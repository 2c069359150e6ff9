"""In every layout, a step with masked documents is that of each document alone on one rank."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from parallel.start import ProcessRank, start_alone
from tests.support.layouts import LENGTH, VOCABULARY, build, config_of, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again
from training.model.decoder import Decoder, plan_layers

RANKS, SAMPLES = 4, 8
# A layout and further keys. Four ranks at most: what is left is data parallel.
CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"tensor": 2, "pipeline": 2, "zero": 1}, ("model.position=t5", "train.recompute=selective")),
    ({"tensor": 2, "pipeline": 2, "zero": 1, "sequence": True}, ("model.position=sinusoidal", "train.recompute=true")),
    ({"tensor": 1, "pipeline": 2, "zero": 1}, ("model.position=alibi", "train.recompute=selective")),
    ({"tensor": 2, "pipeline": 1, "zero": 3, "sequence": True}, ("model.position=kerple",)),
    ({"tensor": 1, "pipeline": 1, "zero": 2}, ("model.position=rotary", "train.recompute=true")),
]
MASKED = ("data.mask_documents=true", f"train.global_batch={SAMPLES}", "train.clip=1e9")


def batch_of(step: int) -> Tensor:
    """Return a global batch with documents, [SAMPLES, 2, LENGTH + 1]; each sample has others, some have one."""
    generator = torch.Generator().manual_seed(100 + step)
    begins = torch.rand(SAMPLES, LENGTH + 1, generator=generator) < 0.1
    begins[::5] = False
    return torch.stack([tokens_of(step, samples=SAMPLES), begins.long()], dim=1)


def train(process: ProcessRank, *, folder: Path) -> list[tuple[float, float, float]]:
    """Return for each case loss and gradient norm of a step, and the loss of other samples before it."""
    seen = []
    for number, (layout, more) in enumerate(CASES):
        start_again(process, number=number)
        engine, groups, shape = build(config_of(layout, run_dir=folder, more=(*MASKED, *more)), world_size=RANKS)
        mine = batch_of(1).chunk(groups.data.size)[groups.data.rank]
        held_out = engine.mean_loss(list(mine.split(2)))
        figures = take_step(engine, batch_of(0), groups=groups, layout=shape, learning_rate=0.0)
        seen.append((figures.loss, figures.grad_norm, held_out))
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[float, float, float]]]:
    return run_ranks(train, ranks=RANKS, arguments={"folder": tmp_path_factory.mktemp("runs")})


def alone(decoder: Decoder, batch: Tensor) -> tuple[float, float]:
    """Return the loss of a batch, and the norm of its gradient, with each document in a pass of its own."""
    decoder.zero_grad()
    total = 0.0
    for tokens, begins in batch.unbind():
        places = {0, *begins[:-1].nonzero().flatten().tolist()}
        for first, end in pairwise([*sorted(places), LENGTH]):
            share = (end - first) / (SAMPLES * LENGTH)
            loss = decoder(tokens[None, first:end], tokens[None, first + 1 : end + 1]) * share
            loss.backward()
            total += loss.item()
    gradients = [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]
    return total, float(torch.stack([gradient.norm() for gradient in gradients]).norm())


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_step_of_any_layout_is_that_of_each_document(
    trained: list[list[tuple[float, float, float]]], index: int, tmp_path: Path
) -> None:
    layout, more = CASES[index]
    config = config_of(layout, run_dir=tmp_path, more=(*MASKED, *more))
    start_alone()
    tensor = lone_groups().tensor
    decoder = Decoder(plan_layers(config.model, vocab_size=VOCABULARY, tensor=tensor, recompute=False))
    initial_weights(decoder, seed=config.run.seed, tensor=tensor)
    expected = (*alone(decoder, batch_of(0)), alone(decoder, batch_of(1))[0])
    for rank in trained:
        assert rank[index] == pytest.approx(expected, rel=1e-5)
