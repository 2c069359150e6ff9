"""Output of `check --memory`."""

from launch.show.console import narrow_table, show_lines, show_table
from training.host_memory import in_gigabytes
from training.memory_changes import change_lines
from training.memory_fit import MemoryFit

_FOR_A_GPU = "for a GPU, name its memory: --gpu-memory-gb 80"


def show_memory(fit: MemoryFit, *, is_default: bool) -> None:
    """Write a table of the estimate, whether it fits, and what to change if it does not.

    Args:
        fit: The estimate and what there is.
        is_default: Whether nobody said how many ranks there are.
    """
    layout, stages = fit.layout, [stage.to_json() for stage in fit.estimate.stages]
    ranks = f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
    if is_default:
        ranks += " (tensor x pipeline; see --ranks)"
    show_lines(
        f"memory of a rank in GB, estimated for {ranks}",
        f"  {layout}, on {'GPUs' if fit.there.on_gpu else 'CPUs'}",
    )
    table = narrow_table(("", *(f"stage {number}" for number in range(layout.pipeline))), left=("",))
    for part in stages[0]:
        table.add_row(part, *(f"{stage[part] / 1e9:.2f}" for stage in stages))
    show_table(table)
    show_lines(*_verdict(fit))


def _verdict(fit: MemoryFit) -> list[str]:
    lines = [f"the largest rank needs {in_gigabytes(fit.estimate.largest)}"]
    if fit.estimate.offloaded:
        lines.append(f"  and {in_gigabytes(fit.estimate.offloaded)} of the machine's memory (parallel.offload)")
    if fit.fits is None:
        return [*lines, f"whether it fits is not known: {fit.there.name}"]
    if fit.fits:
        lines.append(f"it fits {fit.there.name}")
        return lines if fit.there.on_gpu else [*lines, _FOR_A_GPU]
    lines.append(f"it does not fit {fit.there.name}")
    if fit.changes:
        lines.append("to need less memory, change the first of these that you can:")
    for change, size in fit.changes:
        enough = ", which fits" if fit.there.size is not None and size <= fit.there.size else ""
        lines += [f"  {line}: {in_gigabytes(size)}{enough}" for line in change_lines([change])]
    more = f"use a {'GPU' if fit.there.on_gpu else 'machine'} with more memory"
    lines.append(f"or {more}" if fit.changes else more)
    return lines if fit.there.on_gpu else [*lines, _FOR_A_GPU]
