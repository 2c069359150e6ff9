"""`train.compile`: a compiled model is the same as the other, in few compilations, whatever the length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from configs.schema import Model
from parallel.compiled import compile_now, make_compile
from parallel.fused import gelu_tanh, swiglu
from parallel.groups import lone_groups
from parallel.head import Compile, as_it_is
from parallel.seeds import initial_weights
from parallel.start import start_alone
from training.model.decoder import Decoder, plan_layers

VOCABULARY, HIDDEN, HEADS = 97, 32, 4
CPU = torch.device("cpu")


def make(compiled: Compile, *, family: str, recompute: Any = False) -> Decoder:
    start_alone()
    model = Model(layers=3, hidden=HIDDEN, heads=HEADS, family=family, init_std=0.2, embedding_init_std=0.2)
    tensor = lone_groups().tensor
    plan = plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute, compiled=compiled)
    decoder = Decoder(plan).double()
    initial_weights(decoder, seed=1, tensor=tensor)
    return decoder.train()


def loss_and_gradients(decoder: Decoder, *, length: int) -> list[Tensor]:
    decoder.zero_grad()
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(length))
    loss = decoder(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = [parameter.grad for parameter in decoder.parameters()]
    return [loss.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


# Dynamo asks each tensor for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("family", "activation"), [("bloom", gelu_tanh), ("jais", swiglu)])
def test_each_function_is_compiled_once_and_changes_nothing(family: str, activation: Callable[..., Tensor]) -> None:
    start_alone()  # its settings are part of what torch compiled for
    torch._dynamo.reset()  # what another model compiled
    counters.clear()
    compiled = make_compile("on", device=CPU)
    compile_now(
        compiled,
        rows=64,
        widths=(HIDDEN, 4 * HIDDEN),
        heads=(HEADS, HIDDEN // HEADS),
        dtype=torch.float64,
        device=CPU,
        split=False,
        drops=False,
        biases=True,
        activation=activation,
    )
    before = counters["stats"]["unique_graphs"]
    assert before == 6  # a residual norm is compiled with an output and without one
    plain = make(as_it_is, family=family)
    fast = [make(compiled, family=family, recompute=recompute) for recompute in (False, True, "selective")]
    for length in (37, 64, 129):
        expected = loss_and_gradients(plain, length=length)
        for decoder in fast:
            for one, other in zip(loss_and_gradients(decoder, length=length), expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12 * float(other.abs().max()), rtol=0)
    # The head adds its own function; neither another length nor another layer compiles anything.
    assert counters["stats"]["unique_graphs"] == before + 1


def test_auto_and_off_compile_nothing_on_a_cpu() -> None:
    for word in ("auto", "off"):
        assert make_compile(word, device=CPU) is as_it_is
