"""Output of `profile`."""

from pathlib import Path
from typing import Any

from configs.figures import byte_size, counted, scaled
from launch.show.console import narrow_table, show_lines, show_table
from training.profiling.report import TRACE_NAME

_NAME_COLUMNS = 56


def show_profile(document: dict[str, Any], *, out: Path) -> None:
    """Write where a step's time and memory go, and how to open the trace.

    Args:
        document: profile.json.
        out: The folder that holds it.
    """
    ranks = counted(document["ranks"], "rank")
    profiled = document["profiled_step_milliseconds"]
    show_lines(
        f"{document['run']}, {ranks}: {document['layout']}, {document['precision']}, attention "
        f"{document['attention']}, {document['device']}",
        f"step {1000 * document['step_seconds']:.1f} ms, {scaled(document['tokens_per_second'])} tokens/s; "
        f"while it was profiled {profiled:.1f} ms, rank 0:",
    )
    table = narrow_table(("", "ms/step", "share"), left=("",))
    for row in document["categories"]:
        table.add_row(row["name"], f"{row['milliseconds']:.1f}", f"{row['share']:.1%}")
    table.add_row("together", f"{profiled:.1f}", "100.0%")
    show_table(table)
    table = narrow_table(("operation", "part of", "calls/step", "ms/step"), left=("operation", "part of"))
    for row in document["operations"]:
        name = row["name"].removeprefix("## Call ")[:_NAME_COLUMNS]  # torch's words for what it compiled
        table.add_row(name, row["category"], f"{row['calls']:.0f}", f"{row['milliseconds']:.2f}")
    show_table(table)
    show_lines(*_rates(document))
    table = narrow_table(("largest tensors", "each", "count", ""), left=("largest tensors", ""))
    for row in document["tensors"]:
        kind = "held" if row["held"] else "at the step's peak"
        table.add_row(row["name"][:_NAME_COLUMNS], byte_size(row["size"]), str(row["count"]), kind)
    show_table(table)
    show_lines(f"trace: {out / TRACE_NAME} (open it at https://ui.perfetto.dev)")


def _rates(document: dict[str, Any]) -> list[str]:
    products = document["matrix_products"]
    rate, gemm = products["flops_per_second"], products["gemm_flops_per_second"]
    lines = []
    if rate:
        lines.append(
            f"matrix products: {rate / 1e9:,.0f} GFLOP/s, {products['share_of_gemm']:.0%} of one large product alone "
            f"({gemm / 1e9:,.0f})"
        )
    full, causal = document["model_flops_utilization"], document["model_flops_utilization_causal"]
    if full is not None:
        lines.append(f"model FLOPs utilization: {full:.1%} full (attention not halved), {causal:.1%} causal")
    return [*lines, f"peak memory of the largest rank: {byte_size(document['memory_gb'] * 1e9)}"]
