"""The decoder in one process: logits and gradients against random-weight Bloom of transformers and a formula."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from configs.positions import POSITIONS
from configs.schema import Model
from parallel import head
from parallel.shards import declared
from tests.support.bloom_formula import bloom_logits, cross_entropy
from tests.support.models import (
    LAYERS,
    VOCABULARY,
    counterpart_of,
    gradients_of,
    make_decoder,
    small_model,
    weights_of,
)
from training.model.blocks.prenorm import Block
from training.model.single import SingleModel, load_single

ALL_HEADS = (*range(1, 17), 20, 24, 40, 112)


@pytest.mark.parametrize(("length", "all_heads"), [(32, (1, 6, 16)), (128, ALL_HEADS)])
def test_logits_and_gradients_equal_bloom(length: int, all_heads: tuple[int, ...]) -> None:
    for heads in all_heads:
        check_against_transformers(heads, length=length)


@pytest.mark.parametrize("ties", [True, False])
def test_logits_and_gradients_equal_mpt(ties: bool) -> None:
    for heads, length in ((1, 32), (6, 32), (16, 32), (12, 128), (20, 128)):
        check_against_transformers(heads, length=length, family="mpt", tie_embeddings=ties)


def test_an_untied_bloom_equals_transformers() -> None:
    check_against_transformers(6, length=40, tie_embeddings=False)


def test_steeper_and_flatter_slopes_equal_the_formula() -> None:
    # Transformers' Mpt reads alibi_bias_max and does not use it, so it cannot be the oracle.
    for heads, bias_max in ((4, 16), (6, 5), (12, 1)):
        decoder = make_decoder(heads, backend="reference", alibi_bias_max=bias_max).double()
        tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(heads))
        expected = bloom_logits(weights_of(decoder), tokens, layers=LAYERS, heads=heads, bias_max=bias_max)
        torch.testing.assert_close(decoder(tokens), expected, atol=1e-9, rtol=0)


def check_against_transformers(heads: int, *, length: int, **keys: object) -> None:
    head_dim = 8 if heads <= 24 else 4
    decoder, model = make_decoder(heads, head_dim=head_dim, **keys), small_model(heads, head_dim=head_dim, **keys)
    theirs = counterpart_of(weights_of(decoder), model)
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    logits, expected = decoder(tokens[:, :-1]), theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for some in (logits, expected):
        F.cross_entropy(some.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = gradients_of(theirs, model)
    for name, (parameter, _) in declared(decoder).items():
        gradient = gradients[name]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0, msg=name)


FORMULA_LENGTH = 40


@pytest.mark.parametrize(("length", "all_heads"), [(FORMULA_LENGTH, ALL_HEADS), (4 * FORMULA_LENGTH, (1, 6, 16, 112))])
def test_reference_equals_an_explicit_formula_in_fp64(length: int, all_heads: tuple[int, ...]) -> None:
    for heads in all_heads:
        check_against_the_formula(heads, length=length)


@pytest.mark.parametrize("ties", [True, False])
def test_jais_equals_the_formula_in_fp64(ties: bool) -> None:
    for heads, length in ((1, 40), (6, 40), (12, 160)):
        check_against_the_formula(heads, length=length, family="jais", tie_embeddings=ties)


def check_against_the_formula(heads: int, *, length: int, **keys: object) -> None:
    # Transformers and megatron round to fp32 inside, so neither can be this oracle.
    decoder = make_decoder(heads, head_dim=8 if heads <= 24 else 4, backend="reference", **keys).double()
    weights = weights_of(decoder)
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(heads))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits, expected = decoder(inputs), bloom_logits(weights, inputs, layers=LAYERS, heads=heads)
    assert logits.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    for some in (logits, expected):
        cross_entropy(some, targets).backward()
    for name, (parameter, _) in declared(decoder).items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=0, msg=name)


def test_recomputing_changes_no_gradient() -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    gradients = []
    for recompute in (False, True):
        decoder = make_decoder(4, recompute=recompute)
        decoder(tokens).square().mean().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_order_matters_with_positions_and_only_then() -> None:
    tokens = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    swapped = tokens.clone()
    swapped[0, 2], swapped[0, 7] = tokens[0, 7], tokens[0, 2]
    for position in POSITIONS:
        decoder = make_decoder(4, position=position)
        # one block, so that the last token sees the others as a set unless positions tell them apart
        decoder.layers = torch.nn.ModuleList([decoder.layers[0], decoder.layers[1], decoder.layers[3]])
        same = torch.allclose(decoder(tokens)[0, -1], decoder(swapped)[0, -1], atol=1e-5)
        assert same is (position == "none"), position


def test_the_loss_in_chunks_equals_cross_entropy_with_gradients() -> None:
    tokens = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    plain, in_chunks = make_decoder(4).double(), make_decoder(4).double()
    F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten()).backward()
    with patch.object(head, "HEAD_CHUNK_BYTES", 8 * 8 * VOCABULARY):  # 8 tokens: the last chunk is smaller
        (3 * in_chunks(inputs, targets)).backward()
    for (name, (one, _)), (other, _) in zip(declared(plain).items(), declared(in_chunks).values(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad, 3 * one.grad, atol=1e-12, rtol=1e-9, msg=name)


def test_single_model_losses_equal_cross_entropy_of_its_logits() -> None:
    model = SingleModel(make_decoder(4), device=torch.device("cpu"), certificate={})
    tokens = torch.randint(0, VOCABULARY, (3, 700))  # more tokens than the head takes at once
    logits = model.logits(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, -1)
    torch.testing.assert_close(model.losses(tokens), expected, atol=1e-5, rtol=1e-5)
    *_, before, block = model.blocks
    assert isinstance(before, Block)
    assert isinstance(block, Block)
    seen: list[int] = []
    for linear in (before.up, block.query_key_value, block.output, block.up):
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(model.losses(tokens, last=5), expected[:, -5:], atol=1e-5, rtol=1e-5)
    assert seen == [699, 699, 5, 5], "of unscored places the last block computes keys and values"


@pytest.mark.parametrize("trained_with", ["reference", "flex", "flash", "sdpa"])
def test_a_checkpoint_is_read_by_the_default_kernel_in_fp32(trained_with: str) -> None:
    decoder = make_decoder(4)
    weights = weights_of(decoder)
    model = Model(layers=LAYERS, hidden=32, heads=4, attention=trained_with)  # type: ignore[arg-type]
    checkpoint = SimpleNamespace(
        config=SimpleNamespace(model=model, data=SimpleNamespace(mask_documents=False)),
        vocab_size=VOCABULARY,
        slice=lambda shard, *, kind, part: weights[shard.name].detach(),
    )
    single = load_single(checkpoint)  # type: ignore[arg-type]
    (reader,) = single.certificate["ranks"]
    assert (reader["backend"], reader["precision"]) == ("sdpa", "fp32")
    tokens = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(single.logits(tokens), decoder(tokens))


def test_a_parameter_that_declares_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="declares no name and rule"):
        declared(torch.nn.Linear(2, 2))
