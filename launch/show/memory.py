"""Output of `check --memory`."""

from configs.figures import byte_size, counted
from launch.show.console import narrow_table, show_lines, show_table
from training.memory_changes import change_lines
from training.memory_fit import MemoryFit
from training.simpler_layouts import simpler_lines

_WITHOUT = {"parallel.offload": "none", "checkpoint.background": "false"}
_FOR_A_GPU = "for a GPU, name its memory: --gpu-memory-gb 80"


def show_memory(fit: MemoryFit, *, origin: str) -> None:
    """Write a table of the estimate, whether it fits, and what to change if it does not.

    Args:
        fit: The estimate and what there is.
        origin: Where the number of ranks comes from; empty if the user gave it.
    """
    layout, stages = fit.layout, [stage.to_json() for stage in fit.estimate.stages]
    ranks = counted(layout.world_size, "rank")
    if origin:
        ranks += f" ({origin}; see --ranks)"
    show_lines(
        f"memory of a rank in GB, estimated for {ranks}",
        f"  {layout}, on {'GPUs' if fit.available.on_gpu else 'CPUs'}",
    )
    table = narrow_table(("", *(f"stage {number}" for number in range(layout.pipeline))), left=("",))
    for part in stages[0]:
        if part == "validation" and not any(stage[part] for stage in stages):
            continue
        table.add_row(part, *(f"{stage[part] / 1e9:.2f}" for stage in stages))
    show_table(table)
    show_lines(*_verdict(fit))
    if fit.simpler and fit.available.size:
        show_lines(*simpler_lines(fit.simpler, gpu_bytes=fit.available.size))
    show_lines(*_evaluation(fit))


def _evaluation(fit: MemoryFit) -> list[str]:
    """Return what the weights take in `evaluate`, which a chain of jobs comes to when all is trained."""
    ranks = fit.evaluation_ranks
    where = "in one process" if ranks == 1 else f"on each of {ranks} ranks"
    held = f"evaluate: {byte_size(fit.evaluation)} of weights {where}"
    if fit.evaluation_fits is None:
        return [held]
    if fit.evaluation_fits:
        return [f"{held}, which fits"]
    advice = [] if fit.available.is_too_small else ["  raise evaluate.tensor or evaluate.pipeline"]
    return [f"{held}, which leaves no room", *advice]


def _verdict(fit: MemoryFit) -> list[str]:
    lines = [f"the largest rank needs {byte_size(fit.estimate.largest)}"]
    lines += _host(fit)
    if fit.fits is None:
        return [*lines, f"whether it fits is not known: {fit.available.name}"]
    if fit.fits:
        lines.append(f"it fits {fit.available.name}")
        return lines if fit.available.on_gpu else [*lines, _FOR_A_GPU]
    if fit.available.size is not None and fit.estimate.largest <= fit.available.size:  # only its machine is too small
        changes = [f"set {key} to {_WITHOUT[key]}" for key in _host_keys(fit)]
        return [*lines, ", or ".join([*changes, "use a machine with more memory"])]
    lines.append(f"it does not fit {fit.available.name}")
    if fit.available.is_too_small:
        lines.append(f"Python and libraries alone take {byte_size(fit.available.libraries)} of a rank's memory")
    if fit.changes:
        lines.append("to need less memory, change the first of these that you can:")
    for change, then in fit.changes:
        enough = ", which fits" if fit.available.holds(then, ranks=change.layout.world_size) else ""
        lines += [f"  {line}: {byte_size(then.largest)}{enough}" for line in change_lines([change])]
    more = f"use a {'GPU' if fit.available.on_gpu else 'machine'} with more memory"
    if fit.available.is_too_small and not fit.available.on_gpu and fit.layout.world_size > 1:  # they share it
        more += ", or fewer ranks"
    lines.append(f"or {more}" if fit.changes else more)
    return lines if fit.available.on_gpu else [*lines, _FOR_A_GPU]


def _host(fit: MemoryFit) -> list[str]:
    """Return what the ranks take of the machine's memory beside their GPUs', and whether that is there."""
    estimate, host, ranks = fit.estimate, fit.available.host, fit.layout.world_size
    if not estimate.host(ranks=1):
        return []
    line = f"  and {byte_size(estimate.host(ranks=1))} of its machine's memory ({', '.join(_host_keys(fit))})"
    if host is None:
        return [line, "  whether its machine has that for each rank is not checked"]
    here = counted(min(ranks, fit.available.gpus), "rank")
    verb = "exceeds" if fit.available.lacks_host(estimate, ranks=ranks) else "is within"
    return [line, f"  for {here} that {verb} {host}"]


def _host_keys(fit: MemoryFit) -> list[str]:
    """Return the keys for which ranks with GPUs need the machine's memory too."""
    sizes = {"parallel.offload": fit.estimate.offloaded, "checkpoint.background": fit.estimate.copies}
    return [key for key, size in sizes.items() if size]
