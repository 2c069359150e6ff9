"""Output of `trainshort watch`: the picture of a run, fitted to the terminal's width."""

import math
import sys
from collections.abc import Sequence

from rich.text import Text

from configs.figures import byte_size, counted, duration, scaled
from configs.terminal import printable
from launch.show.runs import age_text
from launch.watch import ENDED, RunView
from training.followed_metrics import number
from training.progress_lines import fitted

DEFAULT_WIDTH = 80  # where lines may have any length
_LABEL, _VALUE = 12, 9  # columns
_LEAST_CURVE = 8
_SHOWN_WARNINGS = 3
_FAILED = "bold red"
_STYLES = {
    "running": "green",
    "finished": "green",
    "starting": "cyan",
    "failed": _FAILED,
    "broken": _FAILED,
    "silent": "bold yellow",
    "stopped": "yellow",
}
# from an empty cell to a full one
_BLOCKS, _ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#"


def watch_lines(view: RunView, *, columns: int | None) -> list[Text]:
    """Return the picture of a run, a text per line, each at most `columns` wide; None for any width."""
    width, marks = columns or DEFAULT_WIDTH, _BLOCKS if _can_write(_BLOCKS) else _ASCII
    lines = [*_head(view, width=width), _progress(view, width=width, full=marks[-1]), Text(), _checkpoint(view)]
    if view.starts > 1:
        lines.append(_row("restarts", str(view.starts - 1), f"the newest after step {view.began_after}"))
    if rollbacks := int(number(view.newest, "rollbacks") or 0):
        lines.append(_row("rollbacks", str(rollbacks), "training diverged and went back", style=_FAILED))
    if view.newest:
        lines += [*_loss(view, width=width, marks=marks), *_figures(view, width=width, marks=marks)]
    elif view.saying:
        lines.append(_row("log", "", view.saying))
    lines += _warnings(view)
    if view.problem:
        lines.append(Text(printable(view.problem), style=_FAILED))
    for line in lines if columns else ():
        line.truncate(width)
    return lines


def _head(view: RunView, *, width: int) -> list[Text]:
    state, style = view.state, _STYLES.get(view.state, "")
    if view.is_quiet and view.silent_seconds is not None:
        state += f"{'' if state == 'silent' else ', silent'} for {duration(view.silent_seconds)}"
        style = _STYLES["silent"]
    elif view.silent_seconds is not None and (state in ENDED or age_text(view.silent_seconds) != "now"):
        state += f"{'' if state in ENDED else ', last sign'} {_ago(view.silent_seconds)}"
    warnings = counted(sum(view.warnings.values()), "warning") if view.warnings else ""
    host = f"on {printable(view.host)}" if view.host else ""
    since = f"started {view.started_at.astimezone():%Y-%m-%d %H:%M}" if view.started_at else ""
    parts = [part for part in (state, warnings, host, since) if part]
    second = Text(fitted(parts, spares=(len(parts) - 1, len(parts) - 2), columns=width))
    second.stylize(style, 0, len(state))
    lines = [Text.assemble((printable(str(view.name or "a run")), "bold"), " in ", printable(str(view.path))), second]
    if view.ranks and view.layout:
        lines.append(Text(f"{counted(view.ranks, 'rank')}: {view.layout}"))
    return lines


def _progress(view: RunView, *, width: int, full: str) -> Text:
    figures = [f"step {view.step}/{view.steps or '?'}"]
    if not view.steps:
        return Text(figures[0])
    share = min(1.0, view.step / view.steps)
    figures.append(f"{math.floor(100 * share)}%")
    if view.seconds_left is not None:
        figures.append(f"{duration(view.seconds_left)} left")
    line = Text(fitted(figures, spares=(1,), columns=width))
    if (room := width - len(line) - 2) >= _LEAST_CURVE:
        done = math.floor(share * room)
        line.append("  ").append(full * done, style="green")
        line.append(("░" if full == _BLOCKS[-1] else ".") * (room - done), style="dim")
    return line


def _loss(view: RunView, *, width: int, marks: str) -> list[Text]:
    """Return the rows of the loss: of the last step, the highest and the lowest; and their curve, three rows high."""
    curve, newest = view.curves["loss"], number(view.newest, "loss")
    values = [("loss", newest), ("  highest", curve.highest), ("  lowest", curve.lowest)]
    charts = curve_rows(curve.points(_room(width)), rows=len(values), marks=marks)
    return [
        _row(label, "-" if loss is None or math.isinf(loss) else f"{loss:.4f}", chart, style="cyan")
        for (label, loss), chart in zip(values, charts, strict=True)
    ]


def _figures(view: RunView, *, width: int, marks: str) -> list[Text]:
    newest, lines = view.newest, []
    if view.validation is not None:
        rest = f"at {view.validation.step}"
        if view.best is not None:
            rest += f"; best {view.best.loss:.4f} at {view.best.step}"
        lines.append(_row("validation", f"{view.validation.loss:.4f}", rest))
        for length, loss in view.by_length.items():
            more = loss - view.validation.loss
            lines.append(_row(f"  at {length:,}", f"{loss:.4f}", f"{more:+.4f} by the length alone"))
        lines += [_row("  of source", f"{loss:.4f}", source) for source, loss in view.by_source.items()]
    rate, norm, speed = number(newest, "learning_rate"), number(newest, "grad_norm"), view.tokens_per_second
    for label, name, text in (
        ("lr", "learning_rate", None if rate is None else f"{rate:.3g}"),
        ("grad norm", "grad_norm", None if norm is None else f"{norm:.3g}"),
        ("tokens/s", "tokens_per_second", None if speed is None else scaled(speed)),
    ):
        if text is not None:
            (curve,) = curve_rows(view.curves[name].points(_room(width)), rows=1, marks=marks)
            lines.append(_row(label, text, curve, style="cyan"))
    if view.utilization is not None:
        causal = "" if view.causal_utilization is None else f"causal {view.causal_utilization:.1%}"
        lines.append(_row("MFU", f"{view.utilization:.1%}", causal))
    if (memory := number(newest, "memory_gb")) is not None:
        of = "" if view.ranks in (None, 1) else f"peak, largest of {view.ranks} ranks"
        lines.append(_row("memory", byte_size(memory * 1e9), of or "peak"))
    return lines


def _checkpoint(view: RunView) -> Text:
    failed = int(number(view.newest, "failed_saves") or 0)
    failures = f"{counted(failed, 'save')} of this start failed" if failed else ""
    if view.newest_checkpoint is None or view.checkpoint_seconds is None:
        return _row("checkpoint", "none", failures, style=_FAILED)
    parts = [_ago(view.checkpoint_seconds), f"{view.checkpoints} kept", *([failures] if failures else [])]
    line = _row("checkpoint", f"step {view.newest_checkpoint}", ", ".join(parts))
    line.highlight_words([failures] if failures else [], _FAILED)
    return line


def _warnings(view: RunView) -> list[Text]:
    if not view.warnings:
        return []
    lines = [_row("warnings", str(sum(view.warnings.values())), "of this start, the newest last")]
    for line, times in [*view.warnings.items()][-_SHOWN_WARNINGS:]:
        lines.append(Text(f"  {printable(line)}{f' ({times} times)' if times > 1 else ''}", style="yellow"))
    return lines


def curve_rows(points: Sequence[float], *, rows: int, marks: str) -> list[str]:
    """Return a curve drawn with a column per point, the top row first; the lowest point has the lowest mark.

    Args:
        points: The curve.
        rows: Its height.
        marks: What fills a cell: nothing first, all of it last.
    """
    lowest, highest, full = min(points, default=0.0), max(points, default=0.0), len(marks) - 1
    span = highest - lowest
    is_flat = span <= 1e-6 * max(abs(lowest), abs(highest))  # means of one value differ by rounding
    heights = [1 if is_flat else 1 + round((point - lowest) / span * (rows * full - 1)) for point in points]
    return [
        "".join(marks[min(max(height - row * full, 0), full)] for height in heights) for row in reversed(range(rows))
    ]


def _row(label: str, value: str, rest: str, *, style: str = "") -> Text:
    line = Text(f"{label:<{_LABEL}}{value:>{_VALUE}}")
    if rest:
        line.append("  ").append(printable(rest), style=style)
    return line


def _room(width: int) -> int:
    """Return the columns of a curve behind label and value; none if they are too few to show one."""
    room = width - _LABEL - _VALUE - 2
    return room if room >= _LEAST_CURVE else 0


def _ago(seconds: float) -> str:
    age = age_text(seconds)
    return age if age == "now" else f"{age} ago"


def _can_write(text: str) -> bool:
    """Return whether the encoding of standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
