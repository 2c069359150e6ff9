"""Recomputing in the backward pass: the same gradients, and how much less is kept for it."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from configs.backends import keeps_only_states
from configs.load import load_run
from configs.positions import POSITIONS
from configs.schema import Model
from parallel.groups import lone_groups
from parallel.head import Compile, as_it_is
from parallel.layout import Layout
from parallel.plan import Recompute
from parallel.seeds import initial_weights
from parallel.start import start_alone
from training.memory_activations import stage_activations
from training.model.decoder import Decoder, plan_layers

VOCABULARY = 97
SHORT, LENGTH = 300, 600  # each more than one block of queries
HIDDEN, HEADS, LAYERS, BATCH = 64, 4, 3, 2


def make(recompute: Recompute, *, compiled: Compile = as_it_is, **keys: Any) -> Decoder:
    start_alone()
    model = Model(layers=LAYERS, hidden=HIDDEN, heads=HEADS, **keys)
    tensor = lone_groups().tensor
    decoder = Decoder(plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute, compiled=compiled))
    initial_weights(decoder, seed=1, tensor=tensor)
    return decoder.train()


def gradients(decoder: Decoder) -> list[Tensor]:
    tokens = torch.randint(0, VOCABULARY, (BATCH, SHORT + 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    decoder(tokens[:, :-1], tokens[:, 1:]).backward()
    parts = [parameter.grad for parameter in decoder.parameters()]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("position", sorted(POSITIONS))
def test_gradients_are_the_same_bit_for_bit(position: str, dropout: float) -> None:
    keys = {"position": position, "dropout": dropout, "family": "jais" if position == "alibi" else "bloom"}
    plain = gradients(make(False, **keys))
    assert len(plain) == len(list(make(False, **keys).parameters()))
    for recompute in (True, "selective"):
        again = gradients(make(recompute, **keys))
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one, other), recompute


def kept(recompute: Recompute, *, compiled: bool = False, **keys: Any) -> float:
    """Return what a block keeps for the backward pass, in states [seq, batch, hidden]."""
    blocks = make(recompute, compiled=(lambda function: function) if compiled else as_it_is, **keys).layers[1:-1]
    x = torch.randn(LENGTH, BATCH, HIDDEN, requires_grad=True)
    out: Tensor = blocks[0](x)  # makes what all blocks share
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for block in blocks:
            out = block(out)
    bytes_kept: int = sum(event.self_cpu_memory_usage for event in profiled.events())
    assert out.requires_grad
    return bytes_kept / LAYERS / (x.numel() * 4)


def estimated(recompute: Recompute, *, compiled: bool = False, **keys: Any) -> float:
    """Return the estimate of `kept`: what one more block adds to a stage."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"hidden": HIDDEN, "heads": HEADS, **keys},
        "data": {"sequence_length": LENGTH},
        "parallel": {"tensor": 1, "pipeline": 1},
        "train": {"micro_batch": BATCH, "recompute": recompute, "compile": "on" if compiled else "off"},
    }
    overrides = [f"{name}.{key}={json.dumps(value)}" for name, keys in sections.items() for key, value in keys.items()]
    fewer, more = (
        stage_activations(config, Layout.of(config, world_size=1), 0, on_gpu=False).kept
        for config in (load_run("demo", overrides=[*overrides, f"model.layers={layers}"]) for layers in (2, 3))
    )
    return (more - fewer) / (LENGTH * BATCH * HIDDEN * 4)


# With `selective` the block's input or output, queries, keys and values, attention's output product, and the GELU's
# input; and attention's output, where attention is not recomputed.
@pytest.mark.parametrize(
    ("keys", "states"),
    [
        ({"position": "alibi", "attention": "sdpa"}, (16, 10, 1)),
        ({"position": "none"}, (16, 10, 1)),
        ({"position": "rotary"}, (18, 12, 1)),  # rotated queries and keys beside what they were rotated from
        ({"position": "rotary", "compiled": True}, (16, 10, 1)),  # instead of it
        ({"position": "t5"}, (27.5, 9, 1)),  # a strip of the bias in each layer
        ({"position": "sandwich"}, (28.5, 9, 1)),
        ({"position": "alibi", "attention": "reference"}, (53.5, 9, 1)),  # the scores
        ({"family": "jais"}, (17, 12, 1)),  # a feed-forward of 3 x hidden, with a gate
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_block_keeps_what_its_recompute_says(keys: dict[str, Any], states: tuple[float, ...]) -> None:
    for recompute, expected in zip((False, "selective", True), states, strict=True):
        measured = kept(recompute, **keys)
        assert measured == pytest.approx(expected, abs=0.2), recompute
        assert estimated(recompute, **keys) == pytest.approx(measured, rel=0.03), recompute


def test_attention_that_may_keep_scores_is_recomputed() -> None:
    for attention, head_dim, keeps_little in (
        ("sdpa", 64, True),
        ("sdpa", 20, False),  # torch has no fused kernel for it on a GPU
        ("auto", 20, False),
        ("flex", 20, True),
        ("flash4", 128, True),
        ("reference", 64, False),
    ):
        assert keeps_only_states(attention, position="alibi", head_dim=head_dim) == keeps_little, (attention, head_dim)
    assert not keeps_only_states("sdpa", position="kerple", head_dim=64)
