"""The decoder in many layouts equals transformers' Bloom with random weights: logits and every gradient."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import Model, RunConfig
from parallel.parameter import Shard
from parallel.shards import cut
from parallel.start import ProcessRank
from tests.support.exports import random_weights
from tests.support.layouts import LENGTH, VOCABULARY, build, config_of, tokens_of
from tests.support.models import bloom_names, bloom_of
from tests.support.ranks import run_ranks, start_again

HEADS = (8, 12, 24)
HEAD_DIM = 8
LAYERS = 2
LENGTHS = (LENGTH, 4 * LENGTH)
# (tensor, pipeline) by number of ranks; the rest of the ranks are data parallel.
LAYOUTS = {4: [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)], 8: [(4, 2)]}
UNCLIPPED = ("train.clip=1e9", f"model.layers={LAYERS}")


@dataclass(frozen=True)
class Part:
    """One rank's part of one model in one layout.

    Attributes:
        rank: Rank on the tensor axis.
        shards: Declarations of this rank's parameters, by name.
        gradients: Gradients of the mean loss of a batch, by length: this rank's slices by name.
        logits: This rank's columns by length, [1, length, local_vocab]; None except on the last stage.
    """

    rank: int
    shards: dict[str, Shard]
    gradients: dict[int, dict[str, Tensor]]
    logits: dict[int, Tensor | None]


def weights_for(heads: int) -> dict[str, Tensor]:
    """Return whole weights, each of which changes the logits."""
    return random_weights(Model(layers=LAYERS, hidden=HEAD_DIM * heads, heads=heads), vocab_size=VOCABULARY)


def parts_of_layouts(
    process: ProcessRank, *, layouts: list[tuple[int, int]], folder: Path
) -> dict[tuple[int, int, int], Part]:
    """Return this rank's parts by (tensor, pipeline, heads)."""
    parts = {}
    for number, (tensor, pipeline) in enumerate(layouts):
        start_again(process, number=number)
        for heads in HEADS:
            shape = (*UNCLIPPED, f"model.heads={heads}", f"model.hidden={HEAD_DIM * heads}")
            keys = {"tensor": tensor, "pipeline": pipeline, "zero": 1}
            parts[tensor, pipeline, heads] = _part(config_of(keys, run_dir=folder, more=shape), process, heads=heads)
    return parts


def _part(config: RunConfig, process: ProcessRank, *, heads: int) -> Part:
    engine, groups, layout = build(config, world_size=process.world_size)
    state, whole = engine.state(), weights_for(heads)
    shards = {name: shard for name, (_, shard) in state.parameters.items()}
    for name, shard in shards.items():
        state.write(name, "weight", cut(whole[name], shard=shard, tensor=groups.tensor))
    logits: dict[int, Tensor | None] = {}
    for length in LENGTHS:
        local = engine.local_logits(tokens_of(7, samples=1, length=length - 1))
        logits[length] = None if local is None else local.clone()
    gradients = {}
    for length in LENGTHS:
        for name, shard in shards.items():
            state.write(name, "exp_avg", torch.zeros_like(cut(whole[name], shard=shard, tensor=groups.tensor)))
        mine = tokens_of(0, length=length).chunk(groups.data.size)[groups.data.rank]
        engine.train_step(list(mine.chunk(layout.micro_batches)), learning_rate=0.0)
        # After one step from zero Adam's first moment is (1 - beta1) x the gradient.
        gradients[length] = {name: state.read(name, "exp_avg") / (1 - config.train.beta1) for name in shards}
    return Part(rank=groups.tensor.rank, shards=shards, gradients=gradients, logits=logits)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], list[Part]]:
    """All ranks' parts by (tensor, pipeline, heads)."""
    by_layout: dict[tuple[int, int, int], list[Part]] = {}
    for ranks, layouts in LAYOUTS.items():
        arguments = {"layouts": layouts, "folder": tmp_path_factory.mktemp("runs")}
        by_rank = run_ranks(parts_of_layouts, ranks=ranks, arguments=arguments)
        by_layout |= {key: [parts[key] for parts in by_rank] for key in by_rank[0]}
    return by_layout


def joined(slices: dict[int, Tensor], shard: Shard) -> Tensor:
    """Join the tensor ranks' slices of a parameter and drop the vocabulary's padding."""
    if shard.dim is None:
        return slices[0]
    whole = torch.cat([slices[rank] for rank in sorted(slices)], dim=shard.dim)
    return whole.narrow(shard.dim, 0, shard.shape[shard.dim])


@pytest.mark.parametrize(("tensor", "pipeline"), [*LAYOUTS[4], *LAYOUTS[8]])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_and_gradients_of_every_layout_equal_bloom(
    parts: dict[tuple[int, int, int], list[Part]], tensor: int, pipeline: int, heads: int
) -> None:
    ranks, weights = parts[tensor, pipeline, heads], weights_for(heads)
    bloom = bloom_of(weights, heads=heads, layers=LAYERS)
    for length in LENGTHS:
        columns = {rank.rank: rank.logits[length] for rank in ranks if rank.logits[length] is not None}
        assert sorted(columns) == list(range(tensor))
        logits = torch.cat([columns[rank] for rank in range(tensor)], dim=-1)[..., :VOCABULARY]  # type: ignore[misc]
        with torch.no_grad():
            expected = bloom(tokens_of(7, samples=1, length=length - 1)).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        bloom.zero_grad()
        batch = tokens_of(0, length=length)
        F.cross_entropy(bloom(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        theirs, names = dict(bloom.named_parameters()), bloom_names(layers=LAYERS)
        for name in weights:
            holders = [rank for rank in ranks if name in rank.shards]
            whole = joined({rank.rank: rank.gradients[length][name] for rank in holders}, holders[0].shards[name])
            gradient = theirs[names[name]].grad
            torch.testing.assert_close(whole, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0, msg=name)
