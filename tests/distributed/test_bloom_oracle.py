"""The decoder in many layouts equals transformers' Bloom and Mpt, and the formula of Jais: logits, every gradient."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Model, RunConfig
from parallel.parameter import Shard
from parallel.shards import cut
from parallel.start import ProcessRank
from tests.support.exports import random_weights
from tests.support.layouts import LENGTH, VOCABULARY, build, config_of, tokens_of
from tests.support.models import logits_and_gradients
from tests.support.ranks import run_ranks, start_again

HEAD_DIM = 8
LAYERS = 2


def model_of(heads: int, **keys: Any) -> Model:
    return Model(layers=LAYERS, hidden=HEAD_DIM * heads, heads=heads, **keys)


MODELS = {
    "bloom-12": model_of(12),
    "mpt-24": model_of(24, family="mpt"),
    "mpt-8-untied": model_of(8, family="mpt", tie_embeddings=False),
    "jais-8": model_of(8, family="jais"),
}
LENGTHS = (LENGTH, 4 * LENGTH)
# (tensor, pipeline) by number of ranks; the rest of the ranks are data parallel.
LAYOUTS = {4: [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)], 8: [(4, 2)]}
UNCLIPPED = "train.clip=1e9"


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


def weights_for(name: str) -> dict[str, Tensor]:
    """Return whole weights, each of which changes the logits."""
    return random_weights(MODELS[name], vocab_size=VOCABULARY)


def parts_of_layouts(
    process: ProcessRank, *, layouts: list[tuple[int, int]], folder: Path
) -> dict[tuple[int, int, str], Part]:
    """Return this rank's parts by (tensor, pipeline, name of the model)."""
    parts = {}
    for number, (tensor, pipeline) in enumerate(layouts):
        start_again(process, number=number)
        for name, model in MODELS.items():
            keys = ("layers", "heads", "hidden", "family", "tie_embeddings")
            shape = (UNCLIPPED, *(f"model.{key}={json.dumps(getattr(model, key))}" for key in keys))
            split = {"tensor": tensor, "pipeline": pipeline, "zero": 1}
            parts[tensor, pipeline, name] = _part(config_of(split, run_dir=folder, more=shape), process, model=name)
    return parts


def _part(config: RunConfig, process: ProcessRank, *, model: str) -> Part:
    engine, groups, layout = build(config, world_size=process.world_size)
    state, whole = engine.state(), weights_for(model)
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
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], list[Part]]:
    """All ranks' parts by (tensor, pipeline, name of the model)."""
    by_layout: dict[tuple[int, int, str], list[Part]] = {}
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
@pytest.mark.parametrize("model", MODELS)
def test_logits_and_gradients_of_every_layout_equal_the_oracle(
    parts: dict[tuple[int, int, str], list[Part]], tensor: int, pipeline: int, model: str
) -> None:
    ranks, weights = parts[tensor, pipeline, model], weights_for(model)
    for length in LENGTHS:
        columns = {rank.rank: rank.logits[length] for rank in ranks if rank.logits[length] is not None}
        assert sorted(columns) == list(range(tensor))
        logits = torch.cat([columns[rank] for rank in range(tensor)], dim=-1)[..., :VOCABULARY]  # type: ignore[misc]
        expected, _ = logits_and_gradients(weights, MODELS[model], tokens_of(7, samples=1, length=length))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        _, gradients = logits_and_gradients(weights, MODELS[model], tokens_of(0, length=length))
        for name in weights:
            holders = [rank for rank in ranks if name in rank.shards]
            whole = joined({rank.rank: rank.gradients[length][name] for rank in holders}, holders[0].shards[name])
            gradient = gradients[name]
            torch.testing.assert_close(whole, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0, msg=name)
