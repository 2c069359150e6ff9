"""Draw what a trained model's windows leave out, and what attention takes with and without them.

    python -m benchmarks.windows_picture CHECKPOINT PICTURE.png

Left: how far back the last queries of each head of the first block look in LONGEST tokens of the model's text. Right:
forward and backward of that attention alone, fp32, all cores, with the same queries, keys and values. Prints both as a
JSON line.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.machine import print_result
from benchmarks.windows import tokens_of
from parallel.start import flush_denormals
from training.checkpoint.read import open_checkpoint
from training.evaluation.chart import GREY, head_axes, line_style, new_figure, save_figure
from training.model.attention import Attention
from training.model.kernels.sdpa import Sdpa
from training.model.positions.bias import Bias, SlopeBias
from training.model.proof.head_windows import HeadWindow, head_windows
from training.model.single import load_single
from training.model.windows import LosslessWindows

LONGEST, LENGTHS, REPEATS = 8192, (1024, 2048, 4096, 8192), 3
QUERIES = 1024  # the last ones, which could look back nearly as far as the text is long
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Recorder:
    """An attention that keeps what it was called with."""

    def __init__(self, attend: Attention) -> None:
        self.attend, self.bias = attend, attend.bias
        self.qkv: tuple[Tensor, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.qkv = (q.clone(), k.clone(), v.clone())
        return self.attend(q, k, v)


def main() -> None:
    """Measure and draw."""
    flush_denormals()  # as every rank does
    qkv, bias = _first_block(Path(sys.argv[1]))
    assert bias.local_slopes is not None, "windows come from slopes"
    last = qkv[0][:, :, -QUERIES:]
    heads = head_windows(last, qkv[1], slopes=bias.local_slopes, heads=range(len(bias.local_slopes)))
    with_windows, without = SlopeBias(bias.local_slopes), SlopeBias(bias.local_slopes)
    with_windows.lossless = LosslessWindows()
    ways: dict[str, Attend] = {
        "no positions": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "ALiBi, windows off": Sdpa(without),
        "ALiBi": Sdpa(with_windows),
    }
    ms = {
        length: {name: _milliseconds(attend, [x[:, :, :length] for x in qkv]) for name, attend in ways.items()}
        for length in LENGTHS
    }
    figure = new_figure(inches=(10.4, 4.4))
    left, right = figure.subplots(1, 2)
    _draw_heads(left, heads)
    _draw_times(right, ms, heads=qkv[0].shape[1], head_dim=qkv[0].shape[3])
    save_figure(figure, Path(sys.argv[2]))
    windows = {head.head: {"median": head.median, "largest": head.largest, "share": head.share} for head in heads}
    print_result("windows_picture", windows=windows, ms=ms)


def _first_block(checkpoint: Path) -> tuple[tuple[Tensor, ...], Bias]:
    """Return queries, keys and values of the first block, [1, heads, LONGEST, head_dim], and its bias."""
    opened = open_checkpoint(checkpoint)
    model = load_single(opened)
    block = model.blocks[0]
    block.attend = recorder = _Recorder(block.attend)
    model.losses(tokens_of(opened, count=LONGEST + 1))
    return recorder.qkv, recorder.bias


def _milliseconds(attend: Attend, qkv: list[Tensor]) -> float:
    """Return the fastest of several repeats, forward and backward."""
    fastest = float("inf")
    for _ in range(REPEATS):
        inputs = [x.clone().requires_grad_() for x in qkv]
        began = time.perf_counter()
        attend(*inputs).sum().backward()
        fastest = min(fastest, time.perf_counter() - began)
    return round(1000 * fastest, 1)


def _draw_heads(axes: Axes, heads: tuple[HeadWindow, ...]) -> None:
    numbers = [head.head for head in heads]
    axes.barh(numbers, [LONGEST] * len(heads), color="#DDDDDD", label="skipped")
    axes.barh(numbers, [head.largest for head in heads], color="#9CC9E6", label="computed for some queries")
    axes.barh(numbers, [head.median for head in heads], color="#0072B2", label="computed for most queries")
    ticks = [2**power for power in range(5, LONGEST.bit_length(), 2)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 2, LONGEST)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks(numbers[::3])
    axes.invert_yaxis()
    axes.set_xlabel("distance from the query (tokens)")
    axes.set_ylabel("head, steepest slope first")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    head_axes(axes, heading="What is computed and what is skipped", facts=f"trained weights, {LONGEST:,} tokens, fp32")
    axes.grid(visible=False)


def _draw_times(axes: Axes, ms: dict[int, dict[str, float]], *, heads: int, head_dim: int) -> None:
    for number, name in enumerate(next(iter(ms.values()))):
        seconds = [times[name] / 1000 for times in ms.values()]
        axes.plot(list(ms), seconds, label=name, linewidth=1.8, markersize=5.5, **line_style(number))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(ms), [f"{length:,}" for length in ms])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=GREY, alpha=0.15)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("seconds, forward and backward")
    axes.legend(frameon=False, fontsize=9)
    head_axes(axes, heading="Attention's time", facts=f"{heads} heads of {head_dim}, fp32, all cores")


if __name__ == "__main__":
    main()
