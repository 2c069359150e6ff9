"""Queries, keys and values out of the projection: views, and one buffer for their gradients."""

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from parallel.heads import view_heads
from training.model.kernels.sdpa import Sdpa
from training.model.positions.bias import SlopeBias

SEQ, BATCH, HEADS, WIDTH = 5, 2, 3, 4
COPIES = ("aten::copy_", "aten::cat", "aten::stack", "aten::zeros")


def projected(*, seq: int = SEQ) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(seq, BATCH, HEADS * 3 * WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def plain(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.view(*qkv.shape[:2], HEADS, 3, WIDTH).permute(3, 1, 2, 0, 4).unbind()


def test_heads_are_views_with_the_gradients_of_views() -> None:
    qkv = projected()
    parts = view_heads(qkv, heads=HEADS)
    for part, expected in zip(parts, plain(qkv), strict=True):
        assert part.shape == (BATCH, HEADS, SEQ, WIDTH)
        assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert torch.equal(part, expected)
    assert torch.autograd.gradcheck(lambda x: view_heads(x, heads=HEADS), (qkv,))
    # A part that is not used has no gradient.
    (grad,) = torch.autograd.grad(parts[1].sum(), qkv)
    assert grad.view(SEQ, BATCH, HEADS, 3, WIDTH).sum((0, 1, 2, 4)).tolist() == [0, SEQ * BATCH * HEADS * WIDTH, 0]


def copies_of(backward: Tensor) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        backward.backward()
    counts = {event.key: event.count for event in recorded.key_averages()}
    return {name: counts.get(name, 0) for name in COPIES}


def test_the_backward_pass_writes_each_gradient_once() -> None:
    counted = []
    for split in (lambda qkv: view_heads(qkv, heads=HEADS), plain):
        q, k, v = split(projected())
        counted.append(copies_of((q * k * v).sum()))
    ours, views = counted
    assert ours == {"aten::copy_": 3, "aten::cat": 0, "aten::stack": 0, "aten::zeros": 0}
    # Plain views write all three twice: stacked, then in the projection's layout.
    assert (views["aten::stack"], views["aten::copy_"]) == (1, 1)


def test_attention_of_the_views_needs_no_copy_to_be_joined() -> None:
    q, k, v = view_heads(projected(seq=300), heads=HEADS)
    out = Sdpa(SlopeBias(torch.ones(HEADS, dtype=torch.float64)))(q, k, v)
    assert out.permute(2, 0, 1, 3).is_contiguous()  # [seq, batch, local_heads, head_dim]: to join copies nothing
