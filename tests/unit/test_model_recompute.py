"""Recomputing in the backward pass: the same gradients, and how much less is kept for it."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from configs.positions import POSITIONS
from configs.schema import Model
from parallel.groups import lone_groups
from parallel.plan import Recompute
from parallel.seeds import initial_weights
from parallel.start import start_alone
from training.model.decoder import Decoder, plan_layers

VOCABULARY = 97
LENGTH = 600  # more than one block of queries
HIDDEN, LAYERS = 64, 3


def make(recompute: Recompute, *, position: str = "alibi", dropout: float = 0.0) -> Decoder:
    start_alone()
    model = Model(layers=LAYERS, hidden=HIDDEN, heads=4, position=position, attention="sdpa", dropout=dropout)
    tensor = lone_groups().tensor
    decoder = Decoder(plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute))
    initial_weights(decoder, seed=1, tensor=tensor)
    return decoder.train()


def gradients(decoder: Decoder) -> list[Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    decoder(tokens[:, :-1], tokens[:, 1:]).backward()
    parts = [parameter.grad for parameter in decoder.parameters()]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("position", sorted(POSITIONS))
def test_gradients_are_the_same_bit_for_bit(position: str, dropout: float) -> None:
    plain = gradients(make(False, position=position, dropout=dropout))
    assert len(plain) == len(list(make(False, position=position).parameters()))
    for recompute in (True, "selective"):
        again = gradients(make(recompute, position=position, dropout=dropout))
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one, other), recompute


def kept(recompute: Recompute) -> float:
    """Return what a block keeps for the backward pass, in states [seq, batch, hidden]."""
    blocks = make(recompute).layers[1:-1]
    x = torch.randn(LENGTH, 2, HIDDEN, requires_grad=True)
    out: Tensor = blocks[0](x)  # makes what all blocks share
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for block in blocks:
            out = block(out)
    bytes_kept: int = sum(event.self_cpu_memory_usage for event in profiled.events())
    assert out.requires_grad
    return bytes_kept / LAYERS / (x.numel() * 4)


def test_selective_keeps_products_and_full_keeps_inputs() -> None:
    whole = kept(False)
    assert 15 < whole < 18
    # the block's input or output, queries, keys and values, attention's output product, and the GELU's input
    assert 9 <= kept("selective") < 9.3
    assert 1 <= kept(True) < 1.1
