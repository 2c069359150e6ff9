"""Output of `doctor`: the machine, its attention backends, the audit of a run's ALiBi."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from configs.figures import byte_size, scaled
from configs.terminal import printable
from launch.show.console import narrow_table, show_folded, show_lines, show_table

# columns that fit a terminal of 80
_LENGTHS_IN_ROW, _HEADS_IN_ROW = 4, 6


def show_machine(report: dict[str, Any]) -> None:
    """Write the report of this machine and its attention backends."""
    cpu, gpus, network = report["cpu"], report["gpus"], report["network"]
    packages = {name: version or "not installed" for name, version in report["packages"].items()}
    rows = {
        "python": f"{report['python']['version']} {report['python']['executable']}",
        "system": report["python"]["system"],
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "cpu": f"{cpu['cores']} cores, "
        f"memory {_memory(cpu['memory_bytes'])}, {_memory(cpu['available_bytes'])} of it free",
        "gpu": _gpus(gpus),
        "ranks talk by": _collectives(gpus),
        "network": _network(network),
        "slurm": ", ".join(f"{name} {path or 'not found'}" for name, path in report["slurm"].items()),
    }
    show_folded(_grid(rows))
    for backend in report["attention"]:
        show_lines("", f"attention {backend['name']}: {'available' if backend['lacks'] is None else 'not available'}")
        rows = {}
        for key in ("what", "positions", "precisions", "devices", "memory", "has_run", "lacks"):
            value = backend[key]
            if value is not None:
                words = ", ".join(value) if isinstance(value, tuple) else value
                rows[key.replace("_", " ")] = f"grows with {words}" if key == "memory" else words
        show_folded(_grid(rows))


def show_audit(report: dict[str, Any]) -> None:
    """Write the precision audit of a run's ALiBi."""
    show_lines(
        f"{report['run']}: {report['backend']} in {report['precision']} on {report['device']}, "
        f"{report['heads']} heads of {report['head_dim']}"
    )
    table = narrow_table(("length", "heads", "rows", "worst row", "its head", "mean", "slope*j: worst", "mean"))
    for audit in report["lengths"]:
        heads = audit["heads"]
        worst = max(heads, key=lambda head: head["measured"]["worst"])
        lost = max(heads, key=lambda head: head["absolute"]["mean"])
        table.add_row(
            f"{audit['length']:,}",
            str(len(heads)),
            f"{audit['queries']:,}",
            f"{worst['measured']['worst']:.1e}",
            str(worst["head"]),
            f"{worst['measured']['mean']:.1e}",
            f"{max(head['absolute']['worst'] for head in heads):.1e}",
            f"{lost['absolute']['mean']:.1e}",
        )
    show_table(table)
    verdict = "every row is within" if report["within"] else "a row is not within"
    show_lines(
        "Rows: the last of each length. Numbers: total variation to exact ALiBi in fp64,",
        "the share of a row's attention that is on wrong keys: the worst row, and the",
        f"mean of its head. slope*j: the error of that form stored in {report['precision']}: the",
        "worst row, and the mean of its worst head.",
        f"{verdict} the limit for {report['precision']}, {report['limit']:g}",
    )
    _show_windows(report)
    if "weights" in report:
        _show_weights(report["weights"])


def _show_windows(report: dict[str, Any]) -> None:
    """Write each head's windows, for the audit's queries and keys."""
    audits = {audit["length"]: {head["head"]: head for head in audit["heads"]} for audit in report["lengths"]}
    slopes = {number: head["slope"] for heads in audits.values() for number, head in heads.items()}
    show_lines(
        "",
        "Windows of each length: the most tokens that one of these rows needs, and the",
        "share of all tokens that its head needs. Older keys weigh less than rounding.",
        *(["They are computed all the same: model.windows is off."] if report["windows"] == "off" else []),
    )
    for lengths in _in_parts([*audits], _LENGTHS_IN_ROW):
        table = narrow_table(("head", "slope", *(f"{length:,}" for length in lengths)))
        for number in sorted(slopes):
            heads = [audits[length].get(number) for length in lengths]
            table.add_row(str(number), f"{slopes[number]:.3g}", *map(_window, heads))
        show_table(table)
    for audit in report["lengths"]:
        if audit["density"] is not None:
            show_lines(f"{audit['length']:,} tokens: {report['backend']} computed {audit['density']:.1%} of the scores")


def _show_weights(weights: dict[str, Any]) -> None:
    """Write the windows of a checkpoint's layers and heads on its held-out text."""
    show_lines("", f"Windows of {weights['checkpoint']}:")
    if "unknown" in weights:
        show_lines(weights["unknown"])
    else:
        show_lines(
            f"on {weights['text']}; the most tokens that a query of the head needs,",
            "and the share of the scores that the layer computed",
        )
    for each in weights["lengths"]:
        show_lines("", f"{each['length']:,} tokens")
        numbers = range(len(each["layers"][0]["heads"]))
        for part in _in_parts(numbers, _HEADS_IN_ROW):
            table = narrow_table(("layer", "scores", *(f"head {number}" for number in part)))
            for layer in each["layers"]:
                density = "-" if layer["density"] is None else f"{layer['density']:.1%}"
                windows = [scaled(layer["heads"][number]["largest"]) for number in part]
                table.add_row(str(layer["layer"]), density, *windows)
            show_table(table)


def _window(head: dict[str, Any] | None) -> str:
    """Return a head's window and its share of the scores; - if it was not drawn at this length."""
    return "-" if head is None else f"{head['window']['largest']:,} {head['window']['share']:4.0%}"


def _in_parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _grid(rows: dict[str, str]) -> Table:
    """Return a table of names and values; long values fold."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        # fold breaks long words too: without it a narrow terminal cuts paths off
        grid.add_row(name, Text(printable(value), overflow="fold"))
    return grid


def _memory(size: int | None) -> str:
    return "unknown" if size is None else byte_size(size)


def _gpus(gpus: dict[str, Any]) -> str:
    if gpus["usable"]:
        return ", ".join(
            f"{gpu['name']} {_memory(gpu['memory_bytes'])}"
            + ("" if gpu["bf16"] else " without bf16: use train.precision fp16")
            for gpu in gpus["usable"]
        )
    build = f"torch is built for CUDA {gpus['torch_cuda']}" if gpus["torch_cuda"] else "torch is built without CUDA"
    return f"{gpus['present']} present, but torch sees none; {build}" if gpus["present"] else f"none; {build}"


def _collectives(gpus: dict[str, Any]) -> str:
    words = [f"{name} {'yes' if gpus[name] else 'no'}" for name in ("nccl", "gloo")]
    return f"{', '.join(words)}; GPU ranks need nccl, CPU ranks gloo"


def _network(network: dict[str, Any]) -> str:
    host, addresses = network["host"], network["addresses"]
    if not addresses:
        name = f"{host} does not resolve: local ranks need no name, ranks of several nodes cannot find this one by it"
    # Debian maps a machine's own name to 127.0.1.1.
    elif all(address.startswith("127.") or address == "::1" for address in addresses):
        name = f"{host} is {', '.join(addresses)}, this machine alone: enough for local ranks, not for several nodes"
    else:
        name = f"{host} is {', '.join(addresses)}"
    port = (
        "a TCP port was bound and reached on 127.0.0.1"
        if network["free_port"]
        else ("no TCP port could be bound and reached on 127.0.0.1: ranks cannot talk to each other")
    )
    return f"{name}; {port}"
