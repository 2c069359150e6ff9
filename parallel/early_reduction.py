"""`parallel.overlap`: average gradients over data ranks while the backward pass computes others."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.axes import Group
from parallel.shards import shard_of

SEGMENT = 64_000_000  # elements that are sent at once, at most


@dataclass
class _Segment:
    """Gradients that lie beside each other, all in the part of one data rank.

    Attributes:
        gradients: They, fp32.
        owner: That rank.
        blocks: Those whose weights have gradients in it; none if others have some too, which are there only in the end.
        waits_for: Those of the blocks that the last backward pass has not left.
        sent: The reduction that is under way, if any.
    """

    gradients: Tensor
    owner: int
    blocks: set[str]
    waits_for: set[str] = field(default_factory=set)
    sent: Any = None


class EarlyReduction:
    """Averages each data rank's own part of the fp32 gradients that DeepSpeed's BF16_Optimizer keeps.

    Gradients are cut into segments. When the backward pass of a step's last micro-batch has left all blocks that have
    weights in one, it is reduced to the rank whose part it is, on NCCL's own stream. All data ranks leave blocks in the
    same order, so they reduce in the same order.
    """

    def __init__(self, engine: Any, *, data: Group) -> None:
        """Watch an engine's blocks.

        Args:
            engine: DeepSpeed's engine, with a BF16_Optimizer.
            data: The data axis.
        """
        self._engine, self._data = engine, data
        self._entered: Counter[str] = Counter()
        optimizer = engine.optimizer
        self._parts = optimizer.fp32_groups_gradient_flat_partition
        self._segments = [
            segment
            for parameters, whole in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True)
            for segment in _segments(parameters, whole, data=data)
        ]
        for name, block in _blocks(engine.module).items():
            block.register_forward_pre_hook(partial(self._enter, name))
        self._begin()

    def finish(self) -> None:
        """Reduce what is left after the backward pass, and wait until this rank's part is there."""
        for segment in self._segments:
            if segment.sent is None:
                self._send(segment)
        for segment in self._segments:
            segment.sent.wait()
        for part in self._parts:
            part.mul_(1 / self._data.size)
        self._begin()

    def _begin(self) -> None:
        self._entered.clear()
        for segment in self._segments:
            segment.waits_for, segment.sent = set(segment.blocks), None

    def _enter(self, name: str, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not (block.training and torch.is_grad_enabled()):
            return
        self._entered[name] += 1
        if self._entered[name] == self._engine.gradient_accumulation_steps():  # the last forward pass is last to return
            inputs[0].register_hook(partial(self._leave, name))  # type: ignore[no-untyped-call]

    def _leave(self, name: str, _: Tensor) -> None:
        for segment in self._segments:
            if name in segment.waits_for:
                segment.waits_for.remove(name)
                if not segment.waits_for:
                    self._send(segment)

    def _send(self, segment: _Segment) -> None:
        segment.sent = dist.reduce(segment.gradients, group=self._data.handle, group_dst=segment.owner, async_op=True)


def _segments(parameters: list[nn.Parameter], whole: Tensor, *, data: Group) -> list[_Segment]:
    """Cut a group's gradients, which lie in the order of its parameters, evenly into segments."""
    size = len(whole) // data.size  # of a rank's part
    cuts = [
        (owner, owner * size + begin, owner * size + min(begin + SEGMENT, size))
        for owner in range(data.size)
        for begin in range(0, size, SEGMENT)
    ]
    bounds = pairwise(accumulate((parameter.numel() for parameter in parameters), initial=0))
    placed = list(zip(bounds, map(_early_block_of, parameters), strict=True))
    segments = []
    for owner, begin, end in cuts:
        blocks = [block for (first, stop), block in placed if first < end and begin < stop]
        known = {block for block in blocks if block is not None}
        segments.append(_Segment(whole[begin:end], owner, set() if None in blocks else known))
    return segments


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules all of whose parameters are a single block's, by its name."""
    blocks: dict[str, nn.Module] = {}
    for each in module.modules():  # outer ones first
        names = {_block_of(parameter) for parameter in each.parameters()}
        if len(names) == 1 and (name := names.pop()) is not None:
            blocks.setdefault(name, each)
    return blocks


def _block_of(parameter: nn.Parameter) -> str | None:
    """Return the block that a parameter belongs to; None for one of no block."""
    number = re.match(r"blocks\.\d+", shard_of(parameter).name)
    return number and number[0]


def _early_block_of(parameter: nn.Parameter) -> str | None:
    """Return the block whose weight matrix this is; None for parameters whose gradients are added in the end."""
    return _block_of(parameter) if shard_of(parameter).is_matrix else None
