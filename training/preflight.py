"""What is checked before a rank starts, by the launcher and again by every rank. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.load import load_run
from configs.paths import check_run_folder, data_folder
from configs.schema import RunConfig
from data_pipeline.counts import load_trainable
from data_pipeline.manifest import Prepared
from parallel.layout import Layout
from training import folder
from training.checkpoint.manifest import CONFIG, TOKENIZER, Manifest, find_checkpoint, list_checkpoints


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
        """Whether the newest checkpoint is that of the last step."""
        return self.newest is not None and self.newest.step >= self.config.train.steps


def make_ready(config: RunConfig, *, world_size: int) -> Ready:
    """Check all that can be checked without other ranks; nothing is written.

    Args:
        config: The run as its file and overrides say.
        world_size: Ranks in all.
    Raises:
        InputError: the ranks, the run folder, the data or a checkpoint does not fit the run.
    """
    layout = Layout.of(config, world_size=world_size)
    run_dir = check_run_folder(config)
    config = folder.settle(config, run_dir=run_dir)
    validates = bool(config.evaluate.every)
    prepared = load_trainable(config.data, folder=data_folder(config), validates=validates)
    newest = find_checkpoint(run_dir)[1] if list_checkpoints(run_dir) else None
    if newest is None and config.train.init_from is not None:
        _check_source(Path(config.train.init_from), config=config, prepared=prepared)
    return Ready(config, run_dir, layout, prepared, newest)


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
