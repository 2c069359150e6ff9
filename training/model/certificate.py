"""The certificate: what each rank's positions are, measured on the attention that will train, checked by all.

Wrong ALiBi trains and says nothing. So each rank states which heads it holds, a hash of their slopes, and how far the
attention it measures for zero queries and keys is from the shape that those slopes must give.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.backends import backend_of
from configs.errors import TrainshortError
from configs.schema import Model
from parallel.groups import Groups
from training.model.alibi import local_heads, slopes
from training.model.attention import Attention
from training.model.decoder import Block
from training.model.probe import DTYPES, TOLERANCE, read_rows, total_variation

PROBED = 64  # positions: the flattest slope of 8 heads still moves 3 % of a row's attention there


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
        error: Largest total variation between a measured row and the expected one; None for a learned bias.
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
    error: float | None

    @property
    def where(self) -> str:
        """This rank in words."""
        return f"rank {self.rank} (tensor {self.tensor_rank}, stage {self.stage}, data {self.data_rank})"


def certify(
    module: nn.Module, model: Model, *, groups: Groups, dtype: torch.dtype, device: torch.device
) -> list[Certificate]:
    """Measure this rank's blocks, gather what all ranks measured, and check it; every rank must call it.

    Args:
        module: This rank's part of the model.
        model: The decoder's shape.
        groups: This rank's places.
        dtype: Type of the forward pass.
        device: Where it runs.
    Returns:
        All ranks' certificates, by rank, the same on every rank.
    Raises:
        TrainshortError: a rank's positions are not what they must be; names the rank, on every rank.
    """
    mine = measure(module, model, groups=groups, dtype=dtype, device=device)
    everyone: list[Any] = [None] * groups.world.size
    dist.all_gather_object(everyone, mine)
    verify(everyone, model, tolerance=TOLERANCE[dtype])
    return everyone


@torch.no_grad()
def measure(
    module: nn.Module, model: Model, *, groups: Groups, dtype: torch.dtype, device: torch.device
) -> Certificate:
    """Return this rank's certificate, measured on each attention that its blocks call."""
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    rows = [
        attention_rows(attend, heads=blocks[0].local_heads, head_dim=model.head_dim, dtype=dtype, device=device)
        for attend in {id(block.attend): block.attend for block in blocks}.values()
    ]
    heads, whole = local_heads(model.heads, tensor=groups.tensor), slopes(model.heads)
    expected = expected_rows([whole[head] for head in heads], position=model.position)
    used = blocks[0].attend.bias.local_slopes
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
        slopes_sha256=None if used is None else hash_slopes(used.tolist()),
        recency=min(float((row[:, -1, -1] - row[:, -1, 0]).min()) for row in rows),
        error=None if expected is None else max(float(total_variation(row, expected).max()) for row in rows),
    )


def attention_rows(attend: Attention, *, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights that attention gives to each key where no score differs, [heads, PROBED, PROBED] fp64."""
    zero = torch.zeros(1, heads, PROBED, head_dim, dtype=dtype, device=device)
    return read_rows(attend, zero, zero)


def expected_rows(head_slopes: Sequence[float], *, position: str) -> Tensor | None:
    """Return the weights that zero queries and keys must give, [heads, PROBED, PROBED] fp64; None if they are learned.

    ALiBi's are geometric: each key further away weighs exp(-slope) times as much. Without a bias all are equal.
    """
    if position == "t5":
        return None
    slope = torch.tensor(head_slopes if position == "alibi" else [0.0] * len(head_slopes), dtype=torch.float64)
    weight = torch.exp(-slope)[:, None] ** torch.arange(PROBED)
    rows = torch.zeros(len(slope), PROBED, PROBED, dtype=torch.float64)
    for row in range(PROBED):
        rows[:, row, : row + 1] = weight[:, : row + 1].flip(1) / weight[:, : row + 1].sum(1, keepdim=True)
    return rows


def hash_slopes(head_slopes: Sequence[float]) -> str:
    """Return the SHA-256 of slopes as little-endian fp32."""
    values = torch.tensor(head_slopes, dtype=torch.float64).to(torch.float32)
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def verify(certificates: Sequence[Certificate], model: Model, *, tolerance: float) -> None:
    """Check that the ranks together hold all heads once, each with its own slopes and the attention they give.

    Raises:
        TrainshortError: names the first rank that is wrong, and how.
    """
    whole = slopes(model.heads)
    for certificate in certificates:
        if model.position == "alibi":
            expected = hash_slopes([whole[head] for head in certificate.heads])
            if certificate.slopes_sha256 != expected:
                _refuse(f"{certificate.where} does not have the slopes of its heads {_span(certificate.heads)}")
            if not certificate.recency > 0:
                _refuse(
                    f"{certificate.where} does not prefer near keys (last less first {certificate.recency:.3g}): "
                    "ALiBi is off, or has the wrong sign"
                )
        if certificate.error is not None and not certificate.error <= tolerance:
            _refuse(
                f"{certificate.where} has attention {certificate.error:.3g} away from the shape that its positions "
                f"must give (allowed {tolerance:g})"
            )
    copies: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for certificate in certificates:
        copies[certificate.stage, certificate.data_rank] += certificate.heads
    for (stage, data_rank), heads in copies.items():
        if sorted(heads) != list(range(model.heads)):
            _refuse(
                f"the tensor ranks of stage {stage}, data {data_rank} hold heads {_span(heads)}, not each head once"
            )


def document(certificates: Sequence[Certificate], model: Model) -> dict[str, Any]:
    """Return the certificates as they are written down."""
    return {"position": model.position, "heads": model.heads, "ranks": [asdict(one) for one in certificates]}


def _span(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))


def _refuse(why: str) -> None:
    raise TrainshortError(f"positions are wrong: {why}; nothing was trained, report this")
