"""The certificate: its measurements on a real decoder, and each fault that it refuses, by rank."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from configs.errors import TrainshortError
from configs.positions import T5_BUCKETS
from configs.precisions import PRECISIONS
from configs.schema import Model
from parallel.axes import Group, Groups
from parallel.groups import lone_groups
from tests.support.models import make_decoder
from training.model.attention import AttentionBlock
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions import t5
from training.model.positions.alibi import slopes
from training.model.positions.bias import QUERY_BLOCK, SlopeBias
from training.model.positions.method import make_position
from training.model.positions.t5 import MAX_DISTANCE, bucket_in_integers, buckets
from training.model.proof.certificate import (
    LONG,
    PROBED,
    Certificate,
    WrongPositions,
    certificates_to_json,
    certify,
    check_certificates,
    expected_rows,
    hash_slopes,
    measure_certificate,
    read_rows,
    recency_and_error,
)

CPU = torch.device("cpu")
HEADS = 8
OTHERWISE = "try something else"
LIMIT = PRECISIONS["fp32"].row_tolerance


def model_of(heads: int, *, position: str = "alibi", backend: str = "sdpa") -> Model:
    return Model(layers=2, hidden=8 * heads, heads=heads, position=position, attention=backend)


def promised(heads: int, *, position: str = "alibi") -> torch.Tensor:
    """What a position method promises to add to the scores of all heads, [heads, LONG]."""
    return make_position(model_of(heads, position=position), {}, tensor=Group(0, 1, None)).penalty(LONG)


def measured(head_slopes: list[float] | None, *, heads: list[int], position: str = "alibi") -> tuple[float, float]:
    """Recency and error of attention that uses `head_slopes` where the slopes of `heads` are expected."""
    bias = SlopeBias(None if head_slopes is None else torch.tensor(head_slopes, dtype=torch.float64))
    expected = promised(HEADS, position=position)[heads]
    recency, error = recency_and_error(Sdpa(bias), torch.zeros(1, len(heads), LONG, 8), expected=expected).tolist()
    return recency, error


def statement(rank: int, *, heads: list[int], used: list[float] | None, stage: int = 0) -> Certificate:
    """The certificate of a rank that holds `heads` and whose attention uses the slopes in `used`."""
    recency, error = measured(used, heads=heads)
    return Certificate(
        rank=rank,
        tensor_rank=rank % 2,
        stage=stage,
        data_rank=0,
        position="alibi",
        backend="sdpa",
        precision="fp32",
        device="cpu",
        heads=tuple(heads),
        slopes_sha256=None if used is None else hash_slopes(used),
        recency=recency,
        error=error,
    )


def two_ranks() -> list[Certificate]:
    """Correct certificates of two tensor ranks."""
    halves = [list(range(4)), list(range(4, 8))]
    return [statement(r, heads=heads, used=[slopes(HEADS)[h] for h in heads]) for r, heads in enumerate(halves)]


def refusal(certificates: list[Certificate], *, position: str = "alibi") -> str:
    with pytest.raises(WrongPositions) as refused:
        check_certificates(
            certificates,
            model_of(HEADS, position=position),
            tolerance=LIMIT,
            otherwise=OTHERWISE,
        )
    assert refused.value.certificates == certificates
    message = str(refused.value)
    assert message.endswith((f"; {OTHERWISE}", "; this is a bug in trainshort: report it"))
    return message


def test_right_ranks_are_accepted() -> None:
    check_certificates(two_ranks(), model_of(HEADS), tolerance=LIMIT, otherwise=OTHERWISE)


def test_the_first_heads_slopes_on_every_rank_are_refused() -> None:
    # Other projects shipped this mistake for months: it trains without an error.
    first = [slopes(HEADS)[head] for head in range(4)]
    wrong = [two_ranks()[0], statement(1, heads=[4, 5, 6, 7], used=first)]
    assert "rank 1 (tensor 1, stage 0, data 0) does not have the slopes of its heads 4, 5, 6, 7" in refusal(wrong)


def test_slopes_of_the_local_head_count_are_refused() -> None:
    wrong = [statement(0, heads=[0, 1, 2, 3], used=slopes(4)), two_ranks()[1]]
    assert "rank 0 (tensor 0, stage 0, data 0) does not have the slopes of its heads 0, 1, 2, 3" in refusal(wrong)


def test_slopes_in_another_order_are_refused() -> None:
    swapped = [slopes(HEADS)[head] for head in (5, 4, 6, 7)]
    wrong = [two_ranks()[0], statement(1, heads=[4, 5, 6, 7], used=swapped)]
    assert "rank 1 (tensor 1, stage 0, data 0) does not have the slopes" in refusal(wrong)


def test_slopes_of_other_heads_are_refused_whatever_the_error() -> None:
    right = two_ranks()
    message = refusal([right[0], replace(right[1], slopes_sha256=right[0].slopes_sha256)])
    assert "rank 1 (tensor 1, stage 0, data 0) does not have the slopes of its heads 4, 5, 6, 7" in message


def test_a_sign_is_refused_whatever_the_error() -> None:
    right = two_ranks()
    message = refusal([replace(right[0], recency=-0.5), right[1]])
    assert (
        "rank 0 (tensor 0, stage 0, data 0) does not prefer near keys (last key's weight minus the first's -0.5)"
        in message
    )


def test_an_inverted_sign_behind_right_slopes_is_refused() -> None:
    right = two_ranks()
    recency, error = measured([-slopes(HEADS)[head] for head in range(4)], heads=[0, 1, 2, 3])
    wrong = [replace(right[0], recency=recency, error=error), right[1]]
    assert (
        "rank 0 (tensor 0, stage 0, data 0) does not prefer near keys (last key's weight minus the first's -"
        in refusal(wrong)
    )


def test_attention_without_bias_behind_right_slopes_is_refused() -> None:
    right = two_ranks()
    recency, error = measured(None, heads=[4, 5, 6, 7])
    wrong = [right[0], replace(right[1], recency=recency, error=error)]
    assert "rank 1 (tensor 1, stage 0, data 0) does not prefer near keys" in refusal(wrong)


def test_no_slopes_at_all_are_refused() -> None:
    wrong = [two_ranks()[0], statement(1, heads=[4, 5, 6, 7], used=None)]
    assert "rank 1 (tensor 1, stage 0, data 0) does not have the slopes" in refusal(wrong)


@pytest.mark.parametrize("factor", [1 / 8**0.5, 1.01])
def test_a_shape_that_is_not_the_slopes_is_refused(factor: float) -> None:
    right = two_ranks()
    recency, error = measured([slopes(HEADS)[head] * factor for head in range(4)], heads=[0, 1, 2, 3])
    message = refusal([replace(right[0], recency=recency, error=error), right[1]])
    assert "rank 0 (tensor 0, stage 0, data 0) has attention " in message
    assert "from what its position method promises" in message
    assert message.endswith(f"(allowed 1e-05), by sdpa in fp32; {OTHERWISE}")


@pytest.mark.parametrize("position", ["none", "rotary", "sinusoidal"])
def test_a_slope_where_the_position_method_has_none_is_refused(position: str) -> None:
    recency, error = measured([0.01] * 8, heads=list(range(8)), position=position)
    wrong = statement(0, heads=list(range(8)), used=None)
    assert "from what its position method promises" in refusal(
        [replace(wrong, recency=recency, error=error)], position=position
    )


@pytest.mark.parametrize("field", ["recency", "error"])
def test_attention_that_is_no_number_is_refused(field: str) -> None:
    right = two_ranks()
    message = refusal([replace(right[0], **{field: math.nan}), right[1]])  # type: ignore[arg-type]
    assert "rank 0 (tensor 0, stage 0, data 0)" in message


def test_heads_held_twice_are_refused() -> None:
    again = replace(two_ranks()[0], rank=1, tensor_rank=1)
    message = refusal([two_ranks()[0], again])
    assert "tensor ranks of stage 0, data 0 hold heads 0, 1, 2, 3, 0, 1, 2, 3, not each head once" in message


def test_heads_held_by_no_rank_are_refused_at_their_stage() -> None:
    right = two_ranks()
    message = refusal([*right, replace(right[0], rank=2, stage=1)])
    assert "tensor ranks of stage 1, data 0 hold heads 0, 1, 2, 3, not each head once" in message


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 112])
def test_expected_rows_equal_a_softmax_of_the_penalties(heads: int) -> None:
    slope = torch.tensor(slopes(heads), dtype=torch.float64)
    places = torch.arange(PROBED)
    distance = places[:, None] - places[None, :]
    for position, scores in (
        ("alibi", -slope[:, None, None] * distance),
        ("none", 0.0 * distance.expand(heads, -1, -1)),
    ):
        rows = expected_rows(promised(heads, position=position), rows=range(PROBED), keys=PROBED)
        torch.testing.assert_close(rows, scores.double().masked_fill(distance < 0, -torch.inf).softmax(-1))


def test_rows_that_alibi_must_give_are_geometric() -> None:
    penalty = torch.tensor([[0.0, -0.5, -1.0, -1.5]], dtype=torch.float64)
    row = expected_rows(penalty, rows=[2], keys=4)[0, 0]
    weights = [math.exp(-1), math.exp(-0.5), 1, 0]
    assert row.tolist() == pytest.approx([weight / sum(weights) for weight in weights])


def test_buckets_in_integers_equal_the_models_and_transformers() -> None:
    found = [bucket_in_integers(distance) for distance in range(2000)]
    assert found == buckets(2000, device=CPU).tolist()
    theirs = T5Attention._relative_position_bucket(
        -torch.arange(2000), bidirectional=False, num_buckets=T5_BUCKETS, max_distance=MAX_DISTANCE
    )
    assert found == theirs.tolist()


@pytest.mark.parametrize("backend", [Reference, Sdpa])
@pytest.mark.parametrize(("queries", "keys", "width"), [(5, 5, 8), (3, 20, 8), (20, 20, 32)])
def test_rows_read_off_the_outputs_are_the_softmax(
    backend: type[Reference] | type[Sdpa], queries: int, keys: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, queries, width, dtype=torch.float64, generator=generator)
    k = torch.randn(1, 2, keys, width, dtype=torch.float64, generator=generator)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    scores = q[0] @ k[0].mT / width**0.5 - torch.tensor([0.5, 0.25])[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    rows = read_rows(backend(SlopeBias(torch.tensor([0.5, 0.25], dtype=torch.float64))), q, k)
    torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def groups() -> Groups:
    make_decoder(1)  # joins the world of one
    return lone_groups()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("position", ["alibi", "none", "rotary", "sinusoidal"])
def test_a_real_decoder_is_certified_to_rounding(groups: Groups, position: str, backend: str) -> None:
    for heads in (1, 6, 112):
        check_certified(groups, heads, position, backend)


def check_certified(groups: Groups, heads: int, position: str, backend: str) -> None:
    decoder = make_decoder(heads, head_dim=4, position=position, backend=backend)
    model = Model(layers=2, hidden=4 * heads, heads=heads, position=position, attention=backend)
    (found,) = certify(decoder, model, groups=groups, precision="fp32", device=CPU)
    assert found.error < 1e-6
    assert (found.heads, found.backend) == (tuple(range(heads)), backend)
    assert (found.slopes_sha256 is None) == (position != "alibi")


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_learned_bias_is_certified_by_its_own_table(
    groups: Groups, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(6, position="t5", backend=backend)
    model = model_of(6, position="t5", backend=backend)
    (found,) = certify(decoder, model, groups=groups, precision="fp32", device=CPU)
    assert (found.slopes_sha256, found.heads) == (None, tuple(range(6)))
    assert found.error < 1e-6
    monkeypatch.setattr(t5, "buckets", lambda length, *, device: buckets(length + 1, device=device)[1:])
    with pytest.raises(WrongPositions, match="from what its position method promises"):
        certify(decoder, model, groups=groups, precision="fp32", device=CPU)


def test_one_block_with_an_attention_of_its_own_is_measured_too(groups: Groups) -> None:
    decoder, model = make_decoder(8), model_of(8)
    decoder.layers[2].attend = Sdpa(SlopeBias(None))  # type: ignore[assignment]
    assert measure_certificate(decoder, model, groups=groups, precision="fp32", device=CPU).recency == pytest.approx(
        0, abs=1e-6
    )
    with pytest.raises(TrainshortError, match=r"rank 0 .*in attention sdpa; set another model.attention, reference is"):
        certify(decoder, model, groups=groups, precision="fp32", device=CPU)


def test_slopes_of_another_ranks_place_are_refused(groups: Groups) -> None:
    decoder, model = make_decoder(HEADS), model_of(HEADS)
    other = make_position(model, {}, tensor=Group(1, 2, None))
    for block in decoder.layers[1:-1]:
        block.position, block.attend = other, Sdpa(other.bias)  # type: ignore[assignment]
    place = replace(groups, tensor=Group(0, 2, None))
    certificate = measure_certificate(decoder, model, groups=place, precision="fp32", device=CPU)
    assert "rank 0 (tensor 0, stage 0, data 0) does not have the slopes of its heads 0, 1, 2, 3" in refusal(
        [certificate]
    )


class WrongPastABlock(SlopeBias):
    """A bias that is right within the first query block, and wrong past it in the first `rows` rows of the strip."""

    def __init__(self, right: SlopeBias, *, rows: int) -> None:
        super().__init__(right.local_slopes)
        self._rows = rows

    def __call__(self, *, rows: int, keys: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        strip = super().__call__(rows=rows, keys=keys, device=device, dtype=dtype).clone()
        if keys > QUERY_BLOCK:
            strip[:, :, : self._rows, :-QUERY_BLOCK] -= 0.01
        return strip


@pytest.mark.parametrize("rows", [1, 17, QUERY_BLOCK])
def test_a_bias_that_is_wrong_past_a_query_block_is_seen(groups: Groups, rows: int) -> None:
    decoder, model = make_decoder(8), model_of(8)
    right = decoder.layers[1].attend.bias
    assert isinstance(right, SlopeBias)
    for block in decoder.layers[1:-1]:
        block.attend = Sdpa(WrongPastABlock(right, rows=rows))  # type: ignore[assignment]
    with pytest.raises(WrongPositions, match="from what its position method promises"):
        certify(decoder, model, groups=groups, precision="fp32", device=CPU)


def test_what_is_no_number_is_written_down_as_none() -> None:
    stated = replace(two_ranks()[0], error=math.nan, recency=math.inf)
    (rank,) = certificates_to_json([stated], model_of(HEADS))["ranks"]
    assert (rank["error"], rank["recency"], rank["heads"]) == (None, None, (0, 1, 2, 3))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_in_16_bits_is_within_what_it_is_allowed(groups: Groups, precision: str) -> None:
    decoder = make_decoder(16)
    (found,) = certify(decoder, model_of(16), groups=groups, precision=precision, device=CPU)
    assert 1e-5 < found.error < PRECISIONS[precision].row_tolerance  # 16 bits were really measured


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_slopes_too_flat_to_be_seen_are_certified(groups: Groups, precision: str) -> None:
    for bias_max in (16, 64):
        decoder, model = (
            make_decoder(8, alibi_bias_max=bias_max),
            model_of(8).model_copy(update={"alibi_bias_max": bias_max}),
        )
        (found,) = certify(decoder, model, groups=groups, precision=precision, device=CPU)
        # but a wrong sign is, and so are steep heads without a bias
        for wrong in (replace(found, recency=-1e-4), replace(found, error=0.01)):
            with pytest.raises(WrongPositions):
                check_certificates([wrong], model, tolerance=3e-3, otherwise="")
        without = make_decoder(8, position="none")
        for layer, other in zip(decoder.layers, without.layers, strict=True):
            if isinstance(layer, AttentionBlock):
                layer.attend = other.attend
        with pytest.raises(WrongPositions):
            certify(decoder, model, groups=groups, precision=precision, device=CPU)
