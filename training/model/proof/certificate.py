"""The certificate: each rank measures its positions on the attention that will train, and all ranks check them.

Wrong ALiBi trains without an error. So each rank states which heads it holds, a hash of their slopes, and how far the
attention that it measures for zero queries and keys is from the shape that its position method promises.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import TrainshortError
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.scales import Scaling, scaled_rates
from configs.schema import Model
from parallel.axes import Groups
from parallel.collectives import all_gather_object
from parallel.compiled import CompilerFailure, compiling
from training.model.attention import Attention, AttentionBlock, backend_used
from training.model.positions.bias import QUERY_BLOCK
from training.model.positions.method import PositionMethod, local_heads
from training.model.proof.attention_weights import dtype_of, in_classes, read_classes, read_rows, total_variation
from training.model.proof.kernel_error import ROW_ERRORS, SHORT, Batch, kernel_fault

PROBED = 64  # positions whose rows are read key by key: there the flattest slope of 8 heads still moves 3 % of a row
LONG = 2 * QUERY_BLOCK + 17  # positions read by classes of keys: three blocks of queries, the last one short
STARTS = range(0, LONG, QUERY_BLOCK)
# first and last query of each block
BLOCK_ENDS = sorted({*STARTS, *(start - 1 for start in STARTS[1:]), LONG - 1})
EDGE = 17  # queries at the edge of a longer sliding window, the first that do not see all keys
LONGEST_EDGE = 8192  # tokens: the edge of a longer window is not read, its keys may not fit into memory
REPORT = "this is a bug in trainshort: report it"
TRAIN_OTHERWISE = "set another model.attention, reference is the plainest, and report this"


@dataclass(frozen=True)
class Certificate:
    """One rank's statement.

    Attributes:
        rank: Place in the world.
        tensor_rank, stage, data_rank: Places on the axes.
        position, backend, precision, device: What was measured.
        heads: Global numbers of this rank's heads.
        slopes_sha256: Hash of their slopes as fp32, in order; None if the position method has none.
        recency: Weight of the last key minus that of the first, smallest over heads; positive if the sign is right.
        error: Largest total variation between a measured row and the promised one.
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
    """A rank's positions are wrong.

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
    precision: str,
    device: torch.device,
    documents: bool = False,
    batches: Sequence[Batch] = (SHORT,),
    otherwise: str = TRAIN_OTHERWISE,
    scaling: Scaling | None = None,
) -> list[Certificate]:
    """Measure this rank's blocks, gather all ranks' certificates and check them; every rank must call it.

    Its attention is compared with `reference` first. If gradients are enabled, the model will train: so are they.

    Args:
        module: This rank's part of the model.
        model: The decoder's shape.
        groups: This rank's places.
        precision: Value of `train.precision`: the type of the forward pass.
        device: Where it runs.
        documents: Whether attention must be able to stay inside documents: then it is compared inside some.
        batches: What its attention is compared on.
        otherwise: What a user can do if this machine's attention is wrong.
        scaling: Scales the slopes; None to leave them as trained.
    Returns:
        All ranks' certificates, by rank, the same on every rank.
    Raises:
        WrongPositions: a rank's positions, or its attention's output or gradients, are wrong; raised on every rank.
    """
    tolerance = PRECISIONS[precision].row_tolerance
    # found first: `auto` then takes another kernel
    fault = _attention_fault(
        module, model, groups=groups, precision=precision, device=device, batches=batches, documents=documents
    )
    mine = measure_certificate(module, model, groups=groups, precision=precision, device=device, fault=fault)
    stated = all_gather_object((mine, fault), group=groups.world)
    certificates = [certificate for certificate, _ in stated]
    if not any(seen and math.isnan(certificate.error) for certificate, seen in stated):  # else a kernel does not run
        check_certificates(certificates, model, tolerance=tolerance, otherwise=otherwise, scaling=scaling)
    use = "train" if torch.is_grad_enabled() else "compute"
    for certificate, seen in stated:
        if seen is not None:
            raise WrongPositions(
                f"{certificate.where} cannot {use} with attention {certificate.backend}: {seen}; {otherwise}",
                certificates,
            )
    return certificates


def _attention_fault(
    module: nn.Module,
    model: Model,
    *,
    groups: Groups,
    precision: str,
    device: torch.device,
    batches: Sequence[Batch],
    documents: bool,
) -> str | None:
    """Return what is wrong with the output or the gradients of this rank's attention, None if nothing is."""
    for attend in _attentions(module):
        fault = kernel_fault(
            attend,
            heads=len(local_heads(model.heads, tensor=groups.tensor)),
            head_dim=model.head_dim,
            dtype=dtype_of(precision),
            device=device,
            limit=ROW_ERRORS * PRECISIONS[precision].row_tolerance,
            batches=batches,
            documents=documents,
        )
        if fault is not None:
            return fault
    return None


def _attentions(module: nn.Module) -> list[Attention]:
    """Return each attention that a module's blocks call, once."""
    blocks = [layer for layer in module.modules() if isinstance(layer, AttentionBlock)]
    return list({id(block.attend): block.attend for block in blocks}.values())


@torch.no_grad()
def measure_certificate(
    module: nn.Module,
    model: Model,
    *,
    groups: Groups,
    precision: str,
    device: torch.device,
    fault: str | None = None,
) -> Certificate:
    """Return this rank's certificate, measured on each attention that its blocks call.

    With a fault, the attention may not run: recency and error are then nan.
    """
    blocks = [layer for layer in module.modules() if isinstance(layer, AttentionBlock)]
    position = blocks[0].position
    # From this rank's own place: weights are split by it, but the modules may wrongly have been built with another.
    heads = local_heads(model.heads, tensor=groups.tensor)
    window = model.window
    expected = promised_penalty(position, distances=LONG, window=window)  # [local_heads, LONG]
    shape = (1, len(heads), LONG, model.head_dim)
    zero = torch.zeros(shape, dtype=dtype_of(precision), device=device)
    attentions = _attentions(module)
    try:
        with compiling():
            measured = torch.stack([recency_and_error(attend, zero, expected=expected) for attend in attentions])
            if window is not None and LONG <= window <= LONGEST_EDGE:
                edge = promised_penalty(position, distances=window + EDGE, window=window)
                errors = torch.stack([edge_error(attend, zero, expected=edge) for attend in attentions])
                measured[:, 1] = torch.maximum(measured[:, 1], errors)
    except CompilerFailure:
        if fault is None:
            raise
        measured = torch.full((1, 2), torch.nan)
    slopes = blocks[0].attend.bias.local_slopes
    return Certificate(
        rank=groups.world.rank,
        tensor_rank=groups.tensor.rank,
        stage=groups.pipeline.rank,
        data_rank=groups.data.rank,
        position=model.position,
        backend=backend_used(attentions[0], attention=model.attention, like=zero).name,
        precision=precision,
        device=device.type,
        heads=tuple(heads),
        slopes_sha256=None if slopes is None else hash_slopes(slopes.tolist()),
        recency=float(measured[:, 0].min()),
        error=float(measured[:, 1].max()),
    )


def promised_penalty(position: PositionMethod, *, distances: int, window: int | None) -> Tensor:
    """Return the penalty that a position method promises, -inf outside a sliding window.

    Args:
        position: The method.
        distances: Number of distances, from 0 on.
        window: Keys that a query sees, its own included; None for all before it.
    Returns:
        [local_heads, distances] fp64.
    """
    penalty = position.penalty(distances)
    return penalty if window is None else penalty.masked_fill(torch.arange(distances) >= window, -torch.inf)


def expected_rows(penalty: Tensor, *, rows: Sequence[int], keys: int) -> Tensor:
    """Return the weights that zero queries and keys must give, [heads, rows, keys] fp64.

    Args:
        penalty: What is added to a score at each distance, [heads, distances] fp64.
        rows: Positions of the queries.
        keys: How many keys, from position 0 on.
    """
    distance = torch.tensor(rows)[:, None] - torch.arange(keys)
    return penalty[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf).softmax(-1)


def recency_and_error(attend: Attention, zero: Tensor, *, expected: Tensor) -> Tensor:
    """Return how much the last key outweighs the first, and how far rows are from exact, [2]; nan if a weight is.

    Args:
        attend: One attention of this rank.
        zero: Queries and keys of zeros, [1, heads, LONG, head_dim].
        expected: Promised penalty at each distance, [heads, LONG] fp64.
    """
    short = zero[:, :, :PROBED]
    rows = read_rows(attend, short, short)
    exact = expected_rows(expected, rows=range(PROBED), keys=PROBED)
    ends = read_classes(attend, zero, zero)[:, BLOCK_ENDS]
    exact_ends = in_classes(expected_rows(expected, rows=BLOCK_ENDS, keys=LONG), classes=zero.shape[3])
    error = torch.maximum(total_variation(rows, exact).max(), total_variation(ends, exact_ends).max())
    return torch.stack([(rows[:, -1, -1] - rows[:, -1, 0]).min(), error])


def edge_error(attend: Attention, zero: Tensor, *, expected: Tensor) -> Tensor:
    """Return how far the rows of the last EDGE queries are from exact, a scalar; nan if a weight is.

    Args:
        attend: One attention of this rank.
        zero: Queries of zeros, [1, heads, at least EDGE, head_dim].
        expected: Promised penalty at each distance, one per key, [heads, keys] fp64.
    """
    keys, (batch, heads, _, width) = expected.shape[1], zero.shape
    rows = read_classes(attend, zero[:, :, :EDGE], zero.new_zeros(batch, heads, keys, width))
    exact = expected_rows(expected, rows=range(keys - EDGE, keys), keys=keys)
    return total_variation(rows, in_classes(exact, classes=width)).max()


def hash_slopes(head_slopes: Sequence[float]) -> str:
    """Return the SHA-256 of slopes as little-endian fp32."""
    values = torch.tensor(head_slopes, dtype=torch.float64).to(torch.float32)
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def check_certificates(
    certificates: Sequence[Certificate],
    model: Model,
    *,
    tolerance: float,
    otherwise: str,
    scaling: Scaling | None = None,
) -> None:
    """Check that the ranks together hold all heads once, each with its own slopes and the attention they promise.

    Raises:
        WrongPositions: names the first rank that is wrong, how, and what to do.
    """
    why = _wrong_rank(certificates, model, tolerance=tolerance, otherwise=otherwise, scaling=scaling)
    why = why or _wrong_heads(certificates, model)
    if why is not None:
        raise WrongPositions(f"positions are wrong: {why}", certificates)


def _wrong_rank(
    certificates: Sequence[Certificate], model: Model, *, tolerance: float, otherwise: str, scaling: Scaling | None
) -> str | None:
    promised = POSITIONS[model.position].slopes
    slopes = None if promised is None else scaled_rates(promised(model), scaling)
    for certificate in certificates:
        if slopes is not None:
            expected = hash_slopes([slopes[head] for head in certificate.heads])
            if certificate.slopes_sha256 != expected:
                heads = _span(certificate.heads)
                return f"{certificate.where} does not have the slopes of its heads {heads}; {REPORT}"
            # a precision may round away how little a flat slope prefers the last of PROBED keys
            visible = max(tolerance, PRECISIONS[certificate.precision].epsilon)
            is_flat = min(slopes[head] for head in certificate.heads) * PROBED <= visible
            prefers_near = certificate.recency > 0 or (is_flat and certificate.recency == 0)
            if not prefers_near:
                return (
                    f"{certificate.where} does not prefer near keys (last key's weight minus the first's "
                    f"{certificate.recency:.3g}): {certificate.position} is off, or has the wrong sign, in attention "
                    f"{certificate.backend}; {otherwise}"
                )
        if not certificate.error <= tolerance:
            return (
                f"{certificate.where} has attention rows that differ by {certificate.error:.3g} from what its position "
                f"method promises (allowed {tolerance:g}), by {certificate.backend} in {certificate.precision}; "
                f"{otherwise}"
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


def certificates_to_json(
    certificates: Sequence[Certificate], model: Model, *, scaling: Scaling | None = None
) -> dict[str, Any]:
    """Return the certificates as plain values, with the scaling that they are of; JSON has no nan: it becomes None."""
    ranks = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in stated.items()}
        for stated in map(asdict, certificates)
    ]
    scale = {} if scaling is None else {"scale": asdict(scaling)}
    return {"position": model.position, **scale, "heads": model.heads, "ranks": ranks}


def _span(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))
