"""Scaled positions against transformers' rotary functions and against formulas in fp64, up to a loaded model."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from configs.scales import PositionScale, Scaling, parse_scale, scaled_rates
from configs.schema import Model
from parallel.axes import Group
from parallel.groups import lone_groups
from tests.support.bloom_formula import bloom_logits
from tests.support.models import (
    LAYERS,
    ONE_RANK,
    VOCABULARY,
    make_decoder,
    make_wandering_decoder,
    small_model,
    weights_of,
)
from training.api import load
from training.model.cache import KeyValueCache
from training.model.decoder import Decoder
from training.model.kernels.flex import penalty
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import slopes
from training.model.positions.method import make_position
from training.model.positions.rotary import rotary_rates, rotate
from training.model.proof.certificate import WrongPositions, certify
from training.model.scaled import ScaledPositions
from training.model.single import SingleModel, load_single

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
CPU = torch.device("cpu")
TRAINED = 40  # tokens
HEADS = 4


def theirs(method: str, *, head_dim: int, factor: float, train_length: int) -> tuple[Tensor, float]:
    """Transformers' rates, and what it multiplies cosines and sines by."""
    parameters: dict[str, Any] = {"rope_type": method, "factor": factor, "rope_theta": 10000.0}
    if method == "yarn":
        parameters["original_max_position_embeddings"] = train_length
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=train_length)
    config.rope_parameters = parameters
    length = None
    if (
        method == "dynamic"
    ):  # its own factor counts what lies beyond the training length, and 1 is the plain base change
        config.rope_parameters["factor"], length = 1.0, int(factor * train_length)
    return ROPE_INIT_FUNCTIONS[method](config, CPU, seq_len=length)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ours", "method"), [("linear", "linear"), ("ntk", "dynamic"), ("yarn", "yarn")])
def test_rotary_rates_and_gain_equal_transformers(ours: str, method: str) -> None:
    for head_dim, train_length in ((4, 512), (16, 128), (64, 1024), (128, 4096), (128, 64)):
        for factor in (1.0, 2.0, 8.0, 32.0):
            rates, gain = theirs(method, head_dim=head_dim, factor=factor, train_length=train_length)
            scaling = Scaling(ours, factor, train_length)
            scaled = torch.tensor(scaling.rates(rotary_rates(head_dim)))
            torch.testing.assert_close(scaled, rates, rtol=2e-6, atol=0, msg=f"{head_dim}, {train_length}, {factor}")
            assert scaling.gain == pytest.approx(gain, rel=1e-12)


def test_rotation_takes_scaled_rates_and_gain() -> None:
    method = make_position(model_of("rotary"), {}, tensor=ONE_RANK, scaling=Scaling("yarn", 4.0, TRAINED))
    q, k = torch.randn(2, 2, HEADS, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates, gain = theirs("yarn", head_dim=8, factor=4.0, train_length=TRAINED)
    angles = (torch.arange(100)[:, None] * rates.double()).repeat(1, 2)[None]
    expected = apply_rotary_pos_emb(q, k, gain * angles.cos(), gain * angles.sin())
    for ours, exact in zip(method.rotate(q, k, start=0), expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=0)  # their rates are fp32
    later = method.rotate(q[:, :, 60:], k[:, :, 60:], start=60)
    torch.testing.assert_close(later[0], expected[0][:, :, 60:], atol=1e-5, rtol=0)
    plain = make_position(model_of("rotary"), {}, tensor=ONE_RANK)
    assert torch.equal(plain.rotate(q, k, start=3)[0], rotate(q, start=3))


def test_ntk_alibi_is_its_formula_for_powers_of_two() -> None:
    for heads in (2, 8, 64):
        for factor in (1.0, 2.5, 16.0):
            expected = [
                1 / (2 ** (8 * head / heads) * factor ** ((head - 1) / (heads - 1))) for head in range(1, heads + 1)
            ]
            assert Scaling("ntk", factor, 8).rates(slopes(heads)) == pytest.approx(expected, rel=1e-12)


def test_ntk_keeps_the_steepest_and_divides_the_flattest() -> None:
    for heads in range(2, 70):
        before, after = slopes(heads), Scaling("ntk", 4.0, 8).rates(slopes(heads))
        order = sorted(range(heads), key=before.__getitem__)
        assert after[order[-1]] == before[order[-1]]
        assert after[order[0]] == pytest.approx(before[order[0]] / 4)
        shares = [before[head] / after[head] for head in order]
        assert shares == sorted(shares, reverse=True)


def test_kernels_look_scaled_slopes_up() -> None:
    expected = scaled_rates(slopes(6), Scaling("ntk", 6.0, 8))
    for rank in range(2):
        scaling = Scaling("ntk", 6.0, 8)
        position = make_position(small_model(6, position="alibi"), {}, tensor=Group(rank, 2, None), scaling=scaling)
        slope_of = position.bias.slope_of(torch.device("cpu"))
        assert slope_of is not None
        local = torch.tensor(expected[3 * rank : 3 * rank + 3])
        torch.testing.assert_close(slope_of(torch.arange(3)), local, atol=0, rtol=1e-6)


@pytest.mark.parametrize("method", ["linear", "ntk"])
def test_each_rank_attends_with_scaled_slopes_of_its_heads(method: str) -> None:
    heads, factor, keys = 6, 4.0, 300
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, keys, 8, dtype=torch.float64, generator=generator)
    every = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]  # the paper's for 6 heads
    if method == "linear":
        scaled = [slope / factor for slope in every]
    else:  # by powers of the factor, from 0 for 2^-1 to 1 for 2^-8
        scaled = [slope / factor ** ((-math.log2(slope) - 1) / 7) for slope in every]
    distance = torch.arange(keys)[:, None] - torch.arange(keys)
    scores = q @ k.mT / 8**0.5 - torch.tensor(scaled, dtype=torch.float64)[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    for rank in (0, 1):
        model = Model(layers=1, hidden=8 * heads, heads=heads)
        position = make_position(model, {}, tensor=Group(rank, 2, None), scaling=Scaling(method, factor, 8))
        mine = slice(position.heads.start, position.heads.stop)
        for kernel in (Reference, Sdpa):
            ours = kernel(position.bias)(q[:, mine], k[:, mine], v[:, mine])
            torch.testing.assert_close(ours, expected[:, mine], atol=1e-12, rtol=0)
        in_kernel = penalty(position.bias.slope_of(CPU))
        assert in_kernel is not None
        zero, heads_here = torch.zeros(heads // 2), torch.arange(heads // 2)
        added = in_kernel(zero, zero, heads_here, torch.tensor(40), torch.tensor(3))
        torch.testing.assert_close(added, -37 * torch.tensor(scaled[mine]), atol=0, rtol=2e-6)
        promise = -torch.tensor(scaled[mine], dtype=torch.float64)[:, None] * torch.arange(50)
        torch.testing.assert_close(position.penalty(50), promise, atol=1e-12, rtol=0)


def test_windows_leave_out_nothing_that_scaled_slopes_reach() -> None:
    # Divided by 16, a slope reaches 16 times as far: windows of the training's slopes would cut it off.
    keys = 1500
    position = make_position(Model(layers=1, hidden=8, heads=1), {}, tensor=ONE_RANK)
    scaled = make_position(Model(layers=1, hidden=8, heads=1), {}, tensor=ONE_RANK, scaling=Scaling("linear", 16.0, 64))
    for bias in (position.bias, scaled.bias):
        bias.local_slopes = 2.0**5 * bias.local_slopes  # type: ignore[operator]
    q, k, v = torch.randn(3, 1, 1, keys, 8, generator=torch.Generator().manual_seed(0))
    densities = []
    for method in (position, scaled):
        ours = Sdpa(method.bias)(q, k, v)
        assert method.bias.lossless is not None
        densities.append(float(method.bias.lossless.take()[0]))
        torch.testing.assert_close(ours, Reference(method.bias)(q, k, v), atol=1e-5, rtol=0)
    assert densities[0] < densities[1]


def model_of(position: str) -> Model:
    return small_model(HEADS, position=position)


def loaded(position: str, scale: str | None, *, precision: str = "fp32") -> SingleModel:
    """Return a model as it is loaded from a checkpoint, with a scale."""
    weights = weights_of(make_decoder(HEADS, position=position))
    checkpoint: Any = SimpleNamespace(
        config=SimpleNamespace(
            model=model_of(position), data=SimpleNamespace(sequence_length=TRAINED, mask_documents=False)
        ),
        train_length=TRAINED,
        vocab_size=VOCABULARY,
        slice=lambda shard, *, kind, part: weights[shard.name].detach().clone(),
    )
    chosen = None if scale is None else parse_scale(scale)
    return load_single(checkpoint, precision=precision, scale=chosen)


def scale_decoder(decoder: Decoder, scale: str) -> ScaledPositions:
    """Scale an ALiBi decoder; nothing measures it."""
    model, chosen = model_of("alibi"), parse_scale(scale)
    return ScaledPositions(
        decoder, model, tensor=ONE_RANK, scale=chosen, train_length=TRAINED, measure=lambda _: {"measured": True}
    )


def some_tokens(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("position", "scale"), [("alibi", "linear:4"), ("alibi", "ntk:4"), ("rotary", "yarn:4")])
def test_a_loaded_model_equals_the_scaled_formula(position: str, scale: str) -> None:
    tokens, scaling = some_tokens(70), parse_scale(scale).at(70, train_length=TRAINED)
    weights = {name: each.double() for name, each in weights_of(make_decoder(HEADS, position=position)).items()}
    hooks: dict[str, Any] = {}
    distance = torch.arange(70) - torch.arange(70)[:, None]
    if position == "alibi":
        every = torch.tensor(scaling.rates([2.0 ** (-2 * head) for head in range(1, HEADS + 1)]), dtype=torch.float64)
        hooks["penalty"] = every[:, None, None] * distance
    else:
        rates, gain = theirs("yarn", head_dim=8, factor=4.0, train_length=TRAINED)
        angles = (torch.arange(70)[:, None] * rates.double()).repeat(1, 2)[None]
        hooks["penalty"] = torch.zeros(HEADS, 70, 70, dtype=torch.float64)
        hooks["turned"] = lambda x: apply_rotary_pos_emb(x, x, gain * angles.cos(), gain * angles.sin())[0]
    expected = bloom_logits(weights, tokens, layers=LAYERS, heads=HEADS, **hooks).float()
    model = loaded(position, scale)
    torch.testing.assert_close(model.logits(tokens), expected, atol=1e-4, rtol=0)
    assert (loaded(position, None).logits(tokens) - expected).abs().max() > 0.01
    assert model.certificate["scale"] == {"method": scaling.method, "factor": 4.0, "train_length": TRAINED}


@pytest.mark.parametrize("position", ["alibi", "rotary"])
def test_a_scale_without_a_factor_follows_the_length(position: str) -> None:
    tokens, plain, follows = some_tokens(4 * TRAINED + 1), loaded(position, None), loaded(position, "linear")
    for length in (TRAINED // 2, TRAINED, 2 * TRAINED, 3 * TRAINED, TRAINED):
        window, factor = tokens[:, : length + 1], max(1, length // TRAINED)
        fixed = plain if factor == 1 else loaded(position, f"linear:{factor}")
        assert torch.equal(follows.losses(window), fixed.losses(window)), length
        assert follows.certificate["scale"]["factor"] == factor
    assert str(PositionScale("linear", None)) == "linear"
    assert [str(parse_scale(text)) for text in ("ntk:4", "ntk:4.0", "ntk:2.5")] == ["ntk:4", "ntk:4", "ntk:2.5"]


def test_the_scores_of_scaled_attention_are_counted() -> None:
    model = loaded("alibi", "linear")
    assert model.windows is not None
    for length in (4 * TRAINED, 2 * TRAINED):  # with other slopes, which are certified meanwhile
        model.windows.take()
        model.losses(some_tokens(length + 1))
        assert len(model.windows.take()) == LAYERS


def test_slopes_that_are_not_the_scaled_ones_are_refused() -> None:
    model, scaling = model_of("alibi"), Scaling("linear", 4.0, TRAINED)
    plain = make_decoder(HEADS, backend="auto")
    told: dict[str, Any] = {"groups": lone_groups(), "precision": "fp32", "device": CPU}
    certify(plain, model, **told)
    with pytest.raises(WrongPositions, match="does not have the slopes of its heads 0, 1, 2, 3"):
        certify(plain, model, **told, scaling=scaling)
    scaled = make_decoder(HEADS, backend="auto")
    ScaledPositions(
        scaled,
        model,
        tensor=ONE_RANK,
        scale=parse_scale("linear:4"),
        train_length=TRAINED,
        measure=lambda _: {"measured": True},
    )
    certify(scaled, model, **told, scaling=scaling)
    with pytest.raises(WrongPositions, match="does not have the slopes of its heads 0, 1, 2, 3"):
        certify(scaled, model, **told)
    with pytest.raises(AssertionError, match="PositionMethod cannot be scaled"):
        make_position(model_of("none"), {}, tensor=ONE_RANK, scaling=scaling)


def test_a_scale_that_leaves_no_slope_to_see_is_no_fault() -> None:
    for precision in ("fp32", "bf16"):
        model = loaded("alibi", "linear:100000", precision=precision)
        assert model.certificate["ranks"][0]["recency"] >= 0


def test_a_captured_step_takes_the_newest_scale() -> None:
    decoder = make_wandering_decoder()
    positions = ScaledPositions(
        decoder,
        model_of("alibi"),
        tensor=ONE_RANK,
        scale=parse_scale("linear"),
        train_length=TRAINED,
        measure=lambda _: {},
    )
    model = SingleModel(decoder, device=CPU, certificate={}, capture=lambda run: run, positions=positions)
    tokens = some_tokens(100)
    for length in (TRAINED, 40 * TRAINED, TRAINED):
        model.fit_length(length)
        cache = KeyValueCache()
        model.next_logits(tokens[:, :-1], cache)
        torch.testing.assert_close(
            model.next_logits(tokens[:, -1:], cache), model.logits(tokens)[:, -1], atol=1e-4, rtol=0
        )


def test_python_generates_and_scores_with_a_factor() -> None:
    model, plain = load(OLD_RUN, scale="ntk:8"), load(OLD_RUN)
    assert (model.scale, plain.scale, model.certificate["scale"]["factor"]) == ("ntk:8", None, 8.0)
    ids = model.encode("Once upon a time there was")
    assert (model.losses(ids) - plain.losses(ids)).abs().max() > 1e-6
    text = model.generate("Once", tokens=6, temperature=0)
    ids = model.encode("Once")
    for _ in range(text.tokens):
        ids.append(int(model.logits(ids)[-1].argmax()))
    assert model.decode(ids) == text.text
