"""What is checked before a rank starts, by the launcher and again by every rank. Imports no torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from configs.backends import BACKENDS, backend_of, unavailable
from configs.errors import InputError
from configs.load import load_run
from configs.paths import check_run_folder, data_folder
from configs.schema import Model, RunConfig, Train
from data_pipeline.counts import load_trainable
from data_pipeline.manifest import Prepared
from parallel.layout import Layout
from training import folder
from training.checkpoint.manifest import (
    CONFIG,
    TOKENIZER,
    Manifest,
    candidates,
    check_whole,
    find_checkpoint,
    first_whole,
    list_checkpoints,
)


@dataclass(frozen=True)
class Ready:
    """A run that can start.

    Attributes:
        config: The run, with what its first start fixed.
        run_dir: The run folder; it may not be there yet.
        layout: How the world is cut.
        prepared: The data, found whole and long enough.
        newest: Table of contents of the newest checkpoint, where training goes on; None for a first start.
    """

    config: RunConfig
    run_dir: Path
    layout: Layout
    prepared: Prepared
    newest: Manifest | None

    @property
    def finished(self) -> bool:
        """Whether the checkpoint of the last step is there, whole to the last byte, which is read for that."""
        steps = self.config.train.steps
        if self.newest is None or self.newest.step < steps:
            return False
        return first_whole(candidates(self.run_dir), check=check_whole)[1].step >= steps


def make_ready(config: RunConfig, *, world_size: int, device: str) -> Ready:
    """Check all that can be checked without other ranks; nothing is written.

    Args:
        config: The run as its file and overrides say.
        world_size: Ranks in all.
        device: Kind of device of the ranks: cpu or cuda.
    Raises:
        InputError: the ranks, the machine, the run folder, the data or a checkpoint does not fit the run.
    """
    layout = Layout.of(config, world_size=world_size)
    check_backend(config.model, device=device)
    run_dir = check_run_folder(config)
    config = folder.with_fixed_keys(config, run_dir=run_dir)
    _require_learning(config.train)
    validates = bool(config.evaluate.every)
    prepared = load_trainable(config.data, folder=data_folder(config), validates=validates)
    newest = find_checkpoint(run_dir)[1] if list_checkpoints(run_dir) else None
    if newest is not None and newest.step > config.train.steps:
        raise InputError(
            f"train.steps is {config.train.steps}, but {run_dir} is trained to step {newest.step}: "
            f"set train.steps to {newest.step} or more, or choose another run.dir"
        )
    if newest is None and config.train.init_from is not None:
        _check_source(Path(config.train.init_from), config=config, prepared=prepared)
    return Ready(config, run_dir, layout, prepared, newest)


def _require_learning(train: Train) -> None:
    """Refuse steps that would change nothing."""
    assert train.decay_steps is not None, "settled"
    if train.steps > train.decay_steps and not train.min_learning_rate:
        raise InputError(
            f"train.steps is {train.steps}, but from step {train.decay_steps} on the learning rate is 0 "
            "(train.decay_steps, fixed at the first start, and train.min_learning_rate): nothing more would be "
            f"learned; set train.steps to {train.decay_steps}, or go on in another run.dir with train.init_from"
        )


def check_backend(model: Model, *, device: str) -> None:
    """Refuse an attention backend that this machine lacks.

    Args:
        model: Says which.
        device: Kind of device of the ranks: cpu or cuda.
    Raises:
        InputError: names what is lacking.
    """
    why = unavailable(backend_of(model.attention), device=device, packages=installed_packages())
    if why is not None:
        raise InputError(f"model.attention {why}")


def installed_packages() -> frozenset[str]:
    """Return those of the attention backends' packages that are installed; none is imported."""
    wanted = {backend.package for backend in BACKENDS.values() if backend.package}
    return frozenset(package for package in wanted if find_spec(package) is not None)


def _check_source(path: Path, *, config: RunConfig, prepared: Prepared) -> None:
    """Refuse initial weights whose shapes may fit but whose meaning does not."""
    folder, manifest = find_checkpoint(path)
    source = load_run(str(folder / CONFIG))
    for key in ("heads", "position", "family", "layers", "hidden", "inner"):
        seen, wanted = getattr(source.model, key), getattr(config.model, key)
        if seen != wanted:
            raise InputError(
                f"train.init_from {folder} has model.{'feed_forward' if key == 'inner' else key} {seen}, "
                f"the run has {wanted}: weights fit their own model alone"
            )
    if manifest.files[TOKENIZER].sha256 != prepared.tokenizer_sha256:
        raise InputError(
            f"train.init_from {folder} has another tokenizer than the data in {prepared.folder}: "
            f"set data.tokenizer to {folder / TOKENIZER} and prepare in another data.dir"
        )
