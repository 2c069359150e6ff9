"""Rotary positions against transformers' Llama and against what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from parallel.shards import declared
from tests.support.bloom_formula import bloom_logits, cross_entropy
from tests.support.models import LAYERS, VOCABULARY, make_decoder, weights_of
from training.model.positions.rotary import rotate


@pytest.mark.parametrize(("heads", "head_dim", "seq"), [(1, 2, 5), (4, 16, 33), (3, 64, 700)])
def test_turned_queries_and_keys_equal_llamas(heads: int, head_dim: int, seq: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, heads, seq, head_dim)
    config = LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads, max_position_embeddings=seq)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(seq)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for ours, theirs in zip((rotate(q), rotate(k)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 30), second=st.integers(0, 30), shift=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_score_depends_on_the_distance_alone(first: int, second: int, shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=generator)
    turned_q, turned_k = (rotate(x.expand(1, 1, 91, 8))[0, 0] for x in (q, k))
    score = turned_q[first] @ turned_k[second]
    torch.testing.assert_close(turned_q[first + shift] @ turned_k[second + shift], score, atol=1e-5, rtol=0)


def test_type_is_kept_and_position_zero_is_not_turned() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(1, 2, 3, 8, dtype=dtype)
        assert rotate(x).dtype is dtype
        assert torch.equal(rotate(x)[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("length", [30, 300])  # 300: past a query block
def test_decoder_equals_the_formula_with_llamas_rotation(backend: str, length: int) -> None:
    heads, head_dim = 3, 8
    decoder = make_decoder(heads, head_dim=head_dim, position="rotary", backend=backend).double()
    weights = weights_of(decoder)
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    # Llama's own table is fp32; its rotation takes any type.
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * rates).repeat(1, 2)[None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())[0]  # type: ignore[no-any-return]

    logits = decoder(inputs)
    none = torch.zeros(heads, length, length, dtype=torch.float64)
    expected = bloom_logits(weights, inputs, layers=LAYERS, heads=heads, penalty=none, turned=turned)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    for some in (logits, expected):
        cross_entropy(some, targets).backward()
    for name, (parameter, _) in declared(decoder).items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=0, msg=name)
