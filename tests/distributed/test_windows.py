"""Lossless windows change no loss of a run, in one rank and in tensor 2 x pipeline 2: `make test-layouts`."""

from pathlib import Path
from typing import Any

import pytest

from parallel.start import ProcessRank
from tests.support.layouts import build, config_of, name_of, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again

LENGTH = 1024  # twice the keys that the CPU's kernel takes in any case
STEPS = 50
MODES = ("auto", "off")


def train_modes(
    process: ProcessRank, *, layout: dict[str, Any], folder: Path
) -> list[tuple[list[float], float | None]]:
    """Return the losses of a run with windows and of one without, and the share of the scores of the last step."""
    trained = []
    for number, mode in enumerate(MODES):
        start_again(process, number=number)
        run_dir = folder / f"{name_of(layout, ranks=process.world_size)}-{mode}"
        long = ("model.heads=8", "model.layers=2", f"data.sequence_length={LENGTH}")
        batches = ("train.micro_batch=1", "train.global_batch=2", f"model.windows={mode}")
        config = config_of(layout, run_dir=run_dir, more=(*long, *batches))
        engine, groups, found = build(config, world_size=process.world_size)
        figures = [
            take_step(
                engine,
                tokens_of(step, samples=2, length=LENGTH) // 5,  # some tokens never occur: learned soon
                groups=groups,
                layout=found,
                learning_rate=3e-3,
            )
            for step in range(STEPS)
        ]
        trained.append(([figure.loss for figure in figures], figures[-1].attention_density))
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 1, "pipeline": 1, "zero": 0}, {"tensor": 2, "pipeline": 2, "zero": 1}])
def test_fifty_steps_of_a_run_have_the_losses_of_one_without(layout: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"layout": layout, "folder": tmp_path}
    for rank in run_ranks(train_modes, ranks=layout["tensor"] * layout["pipeline"], arguments=arguments):
        (with_windows, density), (without, _) = rank
        assert density is not None
        assert density < 0.9, "no key was left out"
        assert with_windows[-1] < with_windows[0] - 0.5, "nothing was learned"
        assert with_windows == pytest.approx(without, rel=1e-5)
