"""The certificate: what each rank's positions are, measured on the attention that will train, checked by all.

Wrong ALiBi trains and says nothing. So each rank states which heads it holds, a hash of their slopes, and how far the
attention it measures for zero queries and keys is from the shape that those slopes must give.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.backends import backend_of
from configs.errors import TrainshortError
from configs.schema import Model
from parallel.axes import Groups
from parallel.collectives import all_gather_object
from training.model.alibi import local_heads, slopes
from training.model.attention import Attention
from training.model.bias import QUERY_BLOCK, Bias
from training.model.decoder import Block
from training.model.proof.attention_weights import (
    DTYPES,
    ROW_TOLERANCE,
    in_classes,
    read_classes,
    read_rows,
    total_variation,
)
from training.model.t5 import BUCKETS, MAX_DISTANCE, LearnedBias

PROBED = 64  # positions whose rows are read key by key: the flattest slope of 8 heads still moves 3 % of one there
LONG = 2 * QUERY_BLOCK + 17  # and so many by classes of keys: three blocks of queries, the last one short
STARTS = range(0, LONG, QUERY_BLOCK)
BLOCK_ENDS = sorted({*STARTS, *(start - 1 for start in STARTS[1:]), LONG - 1})
REPORT = "this is a fault of trainshort: report it"
TRAIN_OTHERWISE = "set another model.attention, reference is the plainest, and report this"


@dataclass(frozen=True)
class Certificate:
    """One rank's statement.

    Attributes:
        rank: Place in the world.
        tensor_rank, stage, data_rank: Places on the axes.
        position, backend, precision, device: What was measured.
        heads: Global numbers of this rank's heads.
        slopes_sha256: Hash of their slopes as fp32, in order; None where the position method has none.
        recency: Weight of the last key less that of the first, smallest over heads; positive if the sign is right.
        error: Largest total variation between a measured row and the expected one.
    """

    rank: int
    tensor_rank: int
    stage: int
    data_rank: int
    position: str
    backend: str
    precision: str
    device: str
    heads: tuple[int, ...]
    slopes_sha256: str | None
    recency: float
    error: float

    @property
    def where(self) -> str:
        """This rank in words."""
        return f"rank {self.rank} (tensor {self.tensor_rank}, stage {self.stage}, data {self.data_rank})"


class WrongPositions(TrainshortError):
    """A rank's positions are not what they must be.

    Attributes:
        certificates: What all ranks measured.
    """

    def __init__(self, message: str, certificates: Sequence[Certificate]) -> None:
        super().__init__(message)
        self.certificates = certificates


def certify(
    module: nn.Module,
    model: Model,
    *,
    groups: Groups,
    dtype: torch.dtype,
    device: torch.device,
    otherwise: str = TRAIN_OTHERWISE,
) -> list[Certificate]:
    """Measure this rank's blocks, gather what all ranks measured, and check it; every rank must call it.

    Args:
        module: This rank's part of the model.
        model: The decoder's shape.
        groups: This rank's places.
        dtype: Type of the forward pass.
        device: Where it runs.
        otherwise: What a user can do where this machine's attention is wrong.
    Returns:
        All ranks' certificates, by rank, the same on every rank.
    Raises:
        WrongPositions: a rank's positions are not what they must be; names the rank, on every rank.
    """
    mine = measure_certificate(module, model, groups=groups, dtype=dtype, device=device)
    everyone = all_gather_object(mine, group=groups.world)
    check_certificates(everyone, model, tolerance=ROW_TOLERANCE[dtype], otherwise=otherwise)
    return everyone


@torch.no_grad()
def measure_certificate(
    module: nn.Module, model: Model, *, groups: Groups, dtype: torch.dtype, device: torch.device
) -> Certificate:
    """Return this rank's certificate, measured on each attention that its blocks call."""
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    heads, whole, bias = local_heads(model.heads, tensor=groups.tensor), slopes(model.heads), blocks[0].attend.bias
    expected = penalties([whole[head] for head in heads], bias=bias, position=model.position)
    zero = torch.zeros(1, blocks[0].local_heads, LONG, model.head_dim, dtype=dtype, device=device)
    attentions = {id(block.attend): block.attend for block in blocks}.values()
    found = torch.stack([recency_and_error(attend, zero, expected=expected) for attend in attentions])
    return Certificate(
        rank=groups.world.rank,
        tensor_rank=groups.tensor.rank,
        stage=groups.pipeline.rank,
        data_rank=groups.data.rank,
        position=model.position,
        backend=backend_of(model.attention).name,
        precision=next(name for name, known in DTYPES.items() if known is dtype),
        device=device.type,
        heads=tuple(heads),
        slopes_sha256=None if bias.local_slopes is None else hash_slopes(bias.local_slopes.tolist()),
        recency=float(found[:, 0].min()),
        error=float(found[:, 1].max()),
    )


def penalties(head_slopes: Sequence[float], *, bias: Bias, position: str) -> Tensor:
    """Return what exact positions add to a score at each distance, [heads, LONG] fp64.

    ALiBi's are minus slope times distance; T5's are the rank's own table, learned, through buckets computed once more
    in whole numbers; all other methods add nothing.
    """
    if isinstance(bias, LearnedBias):
        return bias.weight.detach().to("cpu", torch.float64)[:, [t5_bucket(distance) for distance in range(LONG)]]
    slope = torch.tensor(head_slopes, dtype=torch.float64) * (position == "alibi")
    return -slope[:, None] * torch.arange(LONG)


def t5_bucket(distance: int) -> int:
    """Return T5's bucket of a distance: the first half exact, the rest logarithmic, without a logarithm."""
    exact = BUCKETS // 2
    # exact + floor(exact * log(distance / exact) / log(ratio)), both sides of each bound raised to the power `exact`.
    bounds = [exact**exact * (MAX_DISTANCE // exact) ** step for step in range(1, exact)]
    return min(distance, exact) + sum(1 for bound in bounds if bound <= distance**exact)


def expected_rows(penalty: Tensor, *, rows: Sequence[int], keys: int) -> Tensor:
    """Return the weights that zero queries and keys must give, [heads, rows, keys] fp64.

    Args:
        penalty: What is added at each distance, [heads, distances] fp64.
        rows: Positions of the queries.
        keys: Positions of the keys, from the first on.
    """
    distance = torch.tensor(rows)[:, None] - torch.arange(keys)
    return penalty[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf).softmax(-1)


def recency_and_error(attend: Attention, zero: Tensor, *, expected: Tensor) -> Tensor:
    """Return how much the last key outweighs the first, and how far rows are from exact, [2], nan where one is.

    Args:
        attend: One attention of this rank.
        zero: Queries and keys without any score, [1, heads, LONG, head_dim].
        expected: What must be added at each distance, [heads, LONG] fp64.
    """
    short = zero[:, :, :PROBED]
    rows = read_rows(attend, short, short)
    exact = expected_rows(expected, rows=range(PROBED), keys=PROBED)
    ends = read_classes(attend, zero, zero)[:, BLOCK_ENDS]
    exact_ends = in_classes(expected_rows(expected, rows=BLOCK_ENDS, keys=LONG), classes=zero.shape[3])
    error = torch.maximum(total_variation(rows, exact).max(), total_variation(ends, exact_ends).max())
    return torch.stack([(rows[:, -1, -1] - rows[:, -1, 0]).min(), error])


def hash_slopes(head_slopes: Sequence[float]) -> str:
    """Return the SHA-256 of slopes as little-endian fp32."""
    values = torch.tensor(head_slopes, dtype=torch.float64).to(torch.float32)
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def check_certificates(certificates: Sequence[Certificate], model: Model, *, tolerance: float, otherwise: str) -> None:
    """Check that the ranks together hold all heads once, each with its own slopes and the attention they give.

    Raises:
        WrongPositions: names the first rank that is wrong, how, and what to do.
    """
    why = _wrong_rank(certificates, model, tolerance=tolerance, otherwise=otherwise)
    why = why or _wrong_heads(certificates, model)
    if why is not None:
        raise WrongPositions(f"positions are wrong: {why}", certificates)


def _wrong_rank(certificates: Sequence[Certificate], model: Model, *, tolerance: float, otherwise: str) -> str | None:
    whole = slopes(model.heads)
    for certificate in certificates:
        if model.position == "alibi":
            expected = hash_slopes([whole[head] for head in certificate.heads])
            if certificate.slopes_sha256 != expected:
                heads = _span(certificate.heads)
                return f"{certificate.where} does not have the slopes of its heads {heads}; {REPORT}"
            if not certificate.recency > 0:
                return (
                    f"{certificate.where} does not prefer near keys (last less first {certificate.recency:.3g}): "
                    f"ALiBi is off, or has the wrong sign, in attention {certificate.backend}; {otherwise}"
                )
        if not certificate.error <= tolerance:
            return (
                f"{certificate.where} has attention {certificate.error:.3g} away from the shape that its positions "
                f"must give (allowed {tolerance:g}), by {certificate.backend} in {certificate.precision}; {otherwise}"
            )
    return None


def _wrong_heads(certificates: Sequence[Certificate], model: Model) -> str | None:
    copies: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for certificate in certificates:
        copies[certificate.stage, certificate.data_rank] += certificate.heads
    for (stage, data_rank), heads in copies.items():
        if sorted(heads) != list(range(model.heads)):
            held = f"the tensor ranks of stage {stage}, data {data_rank} hold heads {_span(heads)}"
            return f"{held}, not each head once; {REPORT}"
    return None


def certificates_to_json(certificates: Sequence[Certificate], model: Model) -> dict[str, Any]:
    """Return the certificates as they are written down; JSON has no nan, so that becomes None."""
    ranks = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in stated.items()}
        for stated in map(asdict, certificates)
    ]
    return {"position": model.position, "heads": model.heads, "ranks": ranks}


def _span(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))
