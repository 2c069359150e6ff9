"""Checks before a run starts, made by the launcher and again by every rank. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from configs.backends import installed_packages, named_backend, unavailable
from configs.errors import InputError
from configs.load import load_run
from configs.paths import check_run_folder, checkpoints_folder, data_folder
from configs.schema import Model, RunConfig, Train
from data_pipeline.counts import load_trainable
from data_pipeline.manifest import Prepared
from parallel.compilers import check_compiling
from parallel.layout import Layout
from parallel.start import environment
from training.checkpoint.manifest import (
    CONFIG_NAME,
    Manifest,
    candidate_folders,
    check_whole,
    find_checkpoint,
    first_whole,
    list_checkpoints,
    step_folder,
)
from training.export.while_training import check_export_every
from training.folder import with_fixed_keys
from training.same_model import model_difference


@dataclass(frozen=True)
class Ready:
    """A run that can start.

    Attributes:
        config: The run, with the keys that its first start fixed.
        run_dir: The run folder, which may not exist yet.
        layout: How the ranks are split into axes.
        prepared: The data, whole and long enough.
        newest: Manifest of the newest checkpoint, which training resumes from; None at a first start.
    """

    config: RunConfig
    run_dir: Path
    layout: Layout
    prepared: Prepared
    newest: Manifest | None

    @property
    def finished(self) -> bool:
        """Whether the last step is saved. Reads every byte of its checkpoint to make sure."""
        steps = self.config.train.steps
        if self.newest is None or self.newest.step < steps:
            return False
        return first_whole(candidate_folders(self.run_dir), check=check_whole, warn=False)[1].step >= steps


def make_ready(config: RunConfig, *, world_size: int, device: str) -> Ready:
    """Check a run as far as one process can, and write nothing.

    Args:
        config: The run file with its overrides.
        world_size: All ranks.
        device: Device type of the ranks: cpu or cuda.
    Raises:
        InputError: the ranks, the machine, the format of its exports, the run folder, the data or a checkpoint does
            not fit the run.
    """
    layout = Layout.of(config, world_size=world_size)
    check_backend(config.model, device=device)
    check_export_every(config)
    check_compiling(config.train.compile, device=device, environ=environment())
    run_dir = check_run_folder(config)
    config = with_fixed_keys(config, run_dir=run_dir)
    require_learning(config.train)
    validates = bool(config.evaluate.every)
    prepared = load_trainable(config.data, folder=data_folder(config), validates=validates)
    newest = newest_to_resume(config, run_dir=run_dir, warn=False)
    if newest is None and config.train.init_from is not None:
        check_init_from(Path(config.train.init_from), config=config, prepared=prepared, warn=False)
    return Ready(config, run_dir, layout, prepared, newest)


def finished_line(run_dir: Path, *, train: Train) -> str:
    """Return what is said of a run that has nothing left to train."""
    assert train.decay_steps is not None, "with_fixed_keys sets it"
    more = "raise train.steps to continue"
    if train.steps >= train.decay_steps and not train.min_learning_rate:  # `require_learning` would refuse more
        more = "its learning rate has fallen to 0, so continue in another run.dir with train.init_from"
    return f"{run_dir} is trained to its last step, {train.steps}: {more}"


def resume_line(run_dir: Path, *, step: int) -> str:
    """Return what a start would resume from."""
    return f"resumes from step {step}, {step_folder(checkpoints_folder(run_dir), step=step)}"


def newest_to_resume(config: RunConfig, *, run_dir: Path, warn: bool = True) -> Manifest | None:
    """Return the manifest of the newest checkpoint of a run; None at a first start.

    Args:
        config: The run, with the keys that its first start fixed.
        run_dir: The run folder.
        warn: Whether to warn about broken ones that are skipped; the resume itself does.
    Raises:
        InputError: no checkpoint is whole, or the newest has no optimizer state, or more steps than the run.
    """
    newest = find_checkpoint(run_dir, warn=warn)[1] if list_checkpoints(run_dir) else None
    if newest is not None and _is_weights_only(newest):
        raise InputError(
            f"{run_dir} holds weights without optimizer state, from which no training resumes: train in another "
            f"run.dir with train.init_from: {run_dir}"
        )
    if newest is not None and newest.step > config.train.steps:
        raise InputError(
            f"train.steps is {config.train.steps}, but {run_dir} is trained to step {newest.step}: "
            f"set train.steps to {newest.step} or more, or choose another run.dir"
        )
    return newest


def _is_weights_only(manifest: Manifest) -> bool:
    """Return whether a checkpoint has no optimizer state, as imported models and averages have none."""
    kinds = {name.split(".")[1] for name in manifest.files if name.endswith(".safetensors")}
    return kinds == {"weight"}


def require_learning(train: Train) -> None:
    """Refuse steps at a learning rate of 0.

    Raises:
        InputError: the run has more steps than its schedule, which ends at 0.
    """
    assert train.decay_steps is not None, "with_fixed_keys sets it"
    if train.steps > train.decay_steps and not train.min_learning_rate:
        raise InputError(
            f"train.steps is {train.steps}, but from step {train.decay_steps} on the learning rate is 0 "
            "(train.decay_steps, fixed at the first start, and train.min_learning_rate): nothing more would be "
            f"learned; set train.steps to {train.decay_steps}, raise train.decay_steps or train.min_learning_rate if "
            "the run has not started, or continue in another run.dir with train.init_from"
        )


def check_backend(model: Model, *, device: str) -> None:
    """Refuse an attention backend that does not run on this machine.

    Args:
        model: The section that names it.
        device: Device type of the ranks: cpu or cuda.
    Raises:
        InputError: names what the machine lacks.
    """
    backend = named_backend(model.attention)  # auto takes one that runs
    why = backend and unavailable(backend, device=device, packages=installed_packages())
    if why is not None:
        raise InputError(f"model.attention {why}")


def check_init_from(path: Path, *, config: RunConfig, prepared: Prepared | None, warn: bool = True) -> None:
    """Refuse weights of another kind of model or tokenizer, even if their shapes fit.

    Args:
        path: A checkpoint or a run folder.
        config: The run.
        prepared: Its data; None if it is not prepared yet.
        warn: Whether to warn about broken checkpoints that are skipped; a start does when it loads the weights.
    Raises:
        InputError: there is no checkpoint, or it does not fit the run or its data.
    """
    folder, manifest = find_checkpoint(path, warn=warn)
    source = load_run(str(folder / CONFIG_NAME))
    if difference := model_difference(source.model, config.model):
        key, seen, wanted = difference
        raise InputError(
            f"train.init_from {folder} has {key} {seen}, the run has {wanted}: initial weights need the same model"
        )
    if prepared is None:
        return
    if manifest.tokenizer_sha256 != prepared.tokenizer_sha256:
        raise InputError(
            f"train.init_from {folder} has another tokenizer than the data in {prepared.folder}: "
            f"set data.tokenizer to {folder / manifest.tokenizer_name} and prepare in another data.dir"
        )
    if manifest.vocab_size != prepared.vocab_size:  # rows that stand for no token
        raise InputError(
            f"train.init_from {folder} has a vocabulary of {manifest.vocab_size}, the data in {prepared.folder} one of "
            f"{prepared.vocab_size}: set data.vocab_size to {manifest.vocab_size} and prepare in another data.dir"
        )
