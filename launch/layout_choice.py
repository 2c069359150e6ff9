"""The layout of a run on this machine, and whether a simpler one fits its GPUs. Imports neither torch nor numpy."""

from collections.abc import Mapping

from configs.errors import InputError
from configs.schema import RunConfig
from launch.machine import gpu_bytes, gpu_count
from parallel.layout import Layout
from training.simpler_layouts import simpler_layout, simpler_lines


def default_layout(config: RunConfig, *, environ: Mapping[str, str]) -> tuple[Layout, str]:
    """Return the layout that `train` starts by default, and where its number of ranks comes from.

    One rank per GPU or, if that is not a legal layout, the fewest ranks.
    """
    if gpus := gpu_count(environ):
        try:
            return Layout.of(config, world_size=gpus), "this machine's GPUs"
        except InputError:
            pass  # the run is for another machine
    return Layout.of(config, world_size=fewest_ranks(config)), "tensor x pipeline"


def simpler_layout_lines(config: RunConfig, *, layout: Layout, environ: Mapping[str, str]) -> list[str]:
    """Return what to say if a layout with fewer splits fits this machine's GPUs too; empty without GPUs."""
    is_split = layout.tensor * layout.pipeline > 1
    size = gpu_bytes(environ) if is_split and gpu_count(environ) else None
    simpler = simpler_layout(config, layout=layout, gpu_bytes=size) if size else None
    return simpler_lines(simpler, gpu_bytes=size) if simpler and size else []


def fewest_ranks(config: RunConfig) -> int:
    """Return the fewest ranks that a run's layout needs."""
    return config.parallel.tensor * config.parallel.pipeline
