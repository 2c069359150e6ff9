"""The decoder in one process against random-weight Bloom of transformers: logits and gradients."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM

from configs.schema import Model
from parallel.groups import lone_tensor_group
from parallel.seeds import initial_weights
from parallel.shards import declared
from parallel.start import start_alone
from training.export.huggingface import huggingface_name
from training.model.decoder import Decoder, plan_layers
from training.model.single import SingleModel

VOCABULARY = 97


def make(heads: int, *, position: str = "alibi", backend: str = "sdpa", recompute: bool = False) -> Decoder:
    start_alone()
    model = Model(
        layers=2,
        hidden=8 * heads,
        heads=heads,
        init_std=0.3,
        position=position,
        attention=backend,  # type: ignore[arg-type]
    )
    tensor = lone_tensor_group()
    decoder = Decoder(plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute))
    initial_weights(decoder, seed=3, tensor=tensor)
    torch.manual_seed(1)
    with torch.no_grad():  # biases and norms that matter
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def bloom_of(decoder: Decoder, *, heads: int) -> BloomForCausalLM:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=8 * heads, n_layer=2, n_head=heads)
    bloom = BloomForCausalLM(config)
    theirs = dict(bloom.named_parameters())
    with torch.no_grad():
        for name, (parameter, _) in declared(decoder).items():
            theirs.pop(huggingface_name(name)).copy_(parameter)
    assert not theirs, f"never set: {list(theirs)}"
    return bloom.eval()


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 20])
@pytest.mark.parametrize("length", [32, 128])
def test_logits_and_gradients_equal_bloom(heads: int, length: int) -> None:
    decoder = make(heads)
    bloom = bloom_of(decoder, heads=heads)
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    logits, expected = decoder(tokens[:, :-1]), bloom(tokens[:, :-1]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for some in (logits, expected):
        F.cross_entropy(some.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = dict(bloom.named_parameters())
    for name, (parameter, _) in declared(decoder).items():
        torch.testing.assert_close(parameter.grad, theirs[huggingface_name(name)].grad, atol=1e-4, rtol=1e-3, msg=name)


def test_recomputing_changes_no_gradient() -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    gradients = []
    for recompute in (False, True):
        decoder = make(4, recompute=recompute)
        decoder(tokens).square().mean().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("position", ["alibi", "sinusoidal", "rotary", "none"])
def test_a_later_token_never_changes_an_earlier_logit(position: str) -> None:
    decoder = make(4, position=position)
    tokens = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 25] = (changed[0, 25] + 1) % VOCABULARY
    before, after = decoder(tokens), decoder(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_order_matters_with_positions_and_only_then() -> None:
    tokens = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    swapped = tokens.clone()
    swapped[0, 2], swapped[0, 7] = tokens[0, 7], tokens[0, 2]
    for position, expected in (("alibi", False), ("sinusoidal", False), ("rotary", False), ("none", True)):
        decoder = make(4, position=position)
        # one block, so that the last token sees the others as a set unless positions tell them apart
        decoder.layers = torch.nn.ModuleList([decoder.layers[0], decoder.layers[1], decoder.layers[3]])
        same = torch.allclose(decoder(tokens)[0, -1], decoder(swapped)[0, -1], atol=1e-5)
        assert same is expected, position


def test_single_model_losses_equal_cross_entropy_of_its_logits() -> None:
    model = SingleModel(make(4), device=torch.device("cpu"))
    tokens = torch.randint(0, VOCABULARY, (3, 700))  # more tokens than the head takes at once
    logits = model.logits(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, -1)
    torch.testing.assert_close(model.losses(tokens), expected, atol=1e-5, rtol=1e-5)


def test_a_parameter_that_declares_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="declares no name and rule"):
        declared(torch.nn.Linear(2, 2))
