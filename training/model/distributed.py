"""A trained decoder over tensor and pipeline ranks, for evaluation: no engine, and no weight twice.

Rank 0 asks for losses, as of a model in one process. The other ranks serve: each pass begins with a broadcast of its
tokens. Windows go through the stages a few at a time, so that all stages work at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import TrainshortError
from configs.precisions import Precision, require_device
from parallel.axes import Groups
from parallel.collectives import all_gather_object
from parallel.documents import Documents
from parallel.layout import head_blocks, stage_bounds
from parallel.parameter import Shard
from parallel.shards import declared
from training.checkpoint.read import Checkpoint, load_slices
from training.model.attention import windows_of
from training.model.decoder import DecoderStage, plan_layers
from training.model.proof.attention_weights import dtype_of
from training.model.single import (
    CPU_BATCH_TOKENS,
    free_bytes,
    gpu_batch_tokens,
    inference,
    inference_certificate,
    inference_model,
)
from training.model.windows import LosslessWindows

_PARTS_OF_A_PASS = 4  # per stage: two stages then wait a ninth of the time for each other


@dataclass(frozen=True)
class _Pass:
    """What rank 0 asks for: windows, each of rows of tokens, and the losses of the last; no windows are the end."""

    windows: int
    rows: int  # 2 with the documents: see `SingleModel.losses`
    tokens: int
    last: int


class DistributedModel:
    """This rank's part of a decoder.

    Attributes:
        certificate: The certificates of all ranks, as plain values.
        batch_tokens: Inputs of one pass that use the devices well.
        windows: Shares of the scores that attention computed, mean over all heads, block by block; None if the ranks
            count none, or compute attention in different ways.
    """

    def __init__(
        self,
        stage: DecoderStage,
        *,
        bounds: tuple[int, ...],
        hidden: int,
        groups: Groups,
        device: torch.device,
        precision: Precision,
        certificate: dict[str, Any],
    ) -> None:
        """Wrap this rank's layers. A collective.

        Args:
            stage: They, with their weights, on the device.
            bounds: Each stage's first block, and the end.
            hidden: Width of the states between them.
            groups: This rank's places.
            device: This rank's device.
            precision: What to compute in.
            certificate: The certificates of all ranks, as plain values.
        """
        self._stage, self._bounds, self._groups, self._device = stage, bounds, groups, device
        self._hidden, self._precision, self.certificate = hidden, precision, certificate
        self._part_tokens = min(all_gather_object(self._free_tokens(), group=groups.world))
        self.batch_tokens = self._part_tokens * (_PARTS_OF_A_PASS * groups.pipeline.size if self._is_staged else 1)
        self._counted = windows_of(stage)
        alike = len({rank["backend"] for rank in certificate["ranks"]}) == 1
        self.windows = LosslessWindows() if alike and self._counted is not None else None

    def losses(self, tokens: Tensor, *, last: int | None = None) -> Tensor:
        """Return the loss of predicted tokens, on rank 0, while the other ranks serve; see `SingleModel.losses`."""
        assert self._groups.world.rank == 0, "rank 0 asks, the other ranks serve"
        windows, each = tokens.shape[0], tokens.shape[-1]
        asked = _Pass(windows, tokens[0].numel() // each, each, each - 1 if last is None else last)
        self._tell(asked)
        return self._run(asked, tokens.reshape(windows, -1, each).to(self._device))

    @contextmanager
    def served(self) -> Iterator[None]:
        """Let the other ranks end when the block has ended; after an error in a pass their launcher ends them."""
        try:
            yield
        except TrainshortError:  # between two passes, where the others wait for the next
            self._tell(_Pass(0, 0, 0, 0))
            raise
        self._tell(_Pass(0, 0, 0, 0))

    def serve(self) -> None:
        """Take part in the passes that rank 0 asks for, until it ends."""
        while True:
            values = torch.empty(len(fields(_Pass)), dtype=torch.int64, device=self._device)
            dist.broadcast(values, group=self._groups.world.handle, group_src=0)
            asked = _Pass(*map(int, values.tolist()))
            if not asked.windows:
                return
            shape = (asked.windows, asked.rows, asked.tokens)
            self._run(asked, torch.empty(shape, dtype=torch.int64, device=self._device))

    @property
    def _is_staged(self) -> bool:
        return self._groups.pipeline.size > 1

    def _free_tokens(self) -> int:
        """Return the inputs of one part of a pass that use this rank's device well."""
        if self._device.type == "cpu":
            return CPU_BATCH_TOKENS
        return max(1, gpu_batch_tokens(free_bytes(self._device), hidden=self._hidden, width=self._precision.width))

    def _tell(self, asked: _Pass) -> None:
        values = torch.tensor(astuple(asked), device=self._device)
        dist.broadcast(values, group=self._groups.world.handle, group_src=0)

    def _run(self, asked: _Pass, tokens: Tensor) -> Tensor:
        """Compute a pass, and return its losses on every rank, [windows, last] fp32; a collective.

        Args:
            asked: The pass.
            tokens: Its tokens [windows, rows, tokens] on rank 0; elsewhere the memory for them.
        """
        pipeline = self._groups.pipeline
        dist.broadcast(tokens, group=self._groups.world.handle, group_src=0)
        density = torch.zeros(self._bounds[-1], dtype=torch.float64, device=self._device)
        losses, begins = [], tokens[:, 1:].cpu()  # at once: reading waits for the device
        if self._counted is not None:
            self._counted.take()
        with inference(self._precision):
            windows = max(1, self._part_tokens // (asked.tokens - 1))
            for part, begun in zip(torch.split(tokens, windows), torch.split(begins, windows), strict=True):
                documents = Documents(begun[:, 0, :-1], device=self._device) if asked.rows > 1 else None
                x = part[:, 0, :-1] if self._stage.is_first else self._received(part)
                x = self._stage.states(x, documents, last=asked.last)
                if self._stage.is_last:
                    losses.append(self._stage.token_losses(x, part[:, 0, -asked.last :].T).T)
                else:
                    dist.send(x.contiguous(), group=pipeline.handle, group_dst=pipeline.rank + 1)
                self._count(density, windows=len(part))
        self._share_density(density / asked.windows)
        if self._stage.is_last:
            joined = torch.cat(losses).contiguous()
        else:
            joined = torch.empty(asked.windows, asked.last, device=self._device)
        if self._is_staged:
            dist.broadcast(joined, group=pipeline.handle, group_src=pipeline.size - 1)
        return joined

    def _received(self, part: Tensor) -> Tensor:
        """Return the states of the stage before, [seq, batch, hidden]."""
        shape = (part.shape[2] - 1, part.shape[0], self._hidden)
        x = torch.empty(shape, dtype=getattr(torch, self._precision.dtype), device=self._device)
        dist.recv(x, group=self._groups.pipeline.handle, group_src=self._groups.pipeline.rank - 1)
        return x

    def _count(self, density: Tensor, *, windows: int) -> None:
        """Add the shares of the scores that this rank's blocks have computed for some windows, [blocks]."""
        taken = [] if self._counted is None else self._counted.take()
        if taken:
            first, end = self._bounds[self._groups.pipeline.rank :][:2]
            density[first:end] += torch.stack(taken).to(density) * windows

    def _share_density(self, density: Tensor) -> None:
        """Note the mean over all ranks' heads of the shares of the scores that a pass has computed, [blocks]."""
        if self.windows is None:
            return
        # Tensor ranks hold equally many heads; blocks of other stages are zero.
        dist.all_reduce(density, group=self._groups.world.handle)
        for share in density / self._groups.tensor.size:
            self.windows.add(share)


class _Weights:
    """The weights of a module, to be loaded from a checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters: dict[str, tuple[nn.Parameter, Shard]] = declared(module)

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """Return the weight alone."""
        return ("weight",)

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Set this tensor rank's slice, given in fp32."""
        assert kind == "weight", f"a model without an optimizer has no {kind}"
        self.parameters[name][0].data.copy_(value)


def load_distributed(
    checkpoint: Checkpoint, *, groups: Groups, device: torch.device, precision: str
) -> DistributedModel:
    """Return this rank's part of the model of a checkpoint of any layout. A collective.

    Args:
        checkpoint: The checkpoint, opened on all ranks.
        groups: This rank's places; tensor x pipeline is the world.
        device: This rank's device.
        precision: Value of `--precision`, whatever it trained in.
    Raises:
        InputError: the precision needs a GPU where there is none, or the checkpoint's files contradict its manifest;
            raised on every rank.
        TrainshortError: its positions are wrong; raised on every rank.
    """
    row, dtype = require_device(precision, device=device.type), dtype_of(precision)
    model, data, vocab_size = inference_model(checkpoint.config.model), checkpoint.config.data, checkpoint.vocab_size
    head = head_blocks(model, vocab_size=vocab_size, length=data.sequence_length)
    bounds = stage_bounds(model.layers, stages=groups.pipeline.size, head=head)

    def place(layer: nn.Module) -> nn.Module:
        for parameter in layer.parameters():  # at once: a rank never holds more than its part
            parameter.data = torch.empty_like(parameter, dtype=dtype, device=device)
        return layer

    documents = data.mask_documents
    plan = plan_layers(model, vocab_size=vocab_size, tensor=groups.tensor, recompute=False, documents=documents)
    stage = DecoderStage(plan.placed(place), bounds=bounds, stage=groups.pipeline.rank).to(device, dtype).eval()
    with torch.no_grad():
        load_slices(_Weights(stage), checkpoint, kinds=("weight",), groups=groups)
    certificate = inference_certificate(
        stage, model, groups=groups, precision=precision, device=device, documents=documents
    )
    return DistributedModel(
        stage,
        bounds=bounds,
        hidden=model.hidden,
        groups=groups,
        device=device,
        precision=row,
        certificate=certificate,
    )
