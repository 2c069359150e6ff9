"""Checks before a run starts, made by the launcher and again by every rank. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from configs.backends import installed_packages, named_backend, unavailable
from configs.errors import InputError
from configs.load import load_run
from configs.paths import check_run_folder, checkpoints_folder, data_folder
from configs.precisions import require_device
from configs.schedules import SCHEDULES
from configs.schema import Model, RunConfig, Train
from configs.strict_yaml import as_yaml
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
from training.folder import another_run, named_checkpoint, with_dotted_keys, with_fixed_keys
from training.rollbacks import rollbacks_of
from training.same_model import model_difference
from training.schedule import first_changed_step, zero_from
from training.state import TrainState

# What decides the optimizer's state and the order of the samples; their content is compared by a hash.
_SAME_IN_A_BRANCH = (
    "train.optimizer",
    "run.seed",
    "data.vocab_size",
    "data.sequence_length",
    "data.split",
    "data.mask_documents",
)


@dataclass(frozen=True)
class Ready:
    """A run that can start.

    Attributes:
        config: The run, with the keys that its first start fixed.
        run_dir: The run folder, which may not exist yet.
        layout: How the ranks are split into axes.
        prepared: The data, whole and long enough.
        newest: Manifest of the newest checkpoint, which training resumes from; None at a first start.
        branch: At a first start, manifest of the checkpoint of `train.branch_from`; None if it is not set.
    """

    config: RunConfig
    run_dir: Path
    layout: Layout
    prepared: Prepared
    newest: Manifest | None
    branch: Manifest | None = None

    @property
    def start(self) -> TrainState:
        """Where training continues, if the checkpoint proves to be whole."""
        return self.newest or self.branch or TrainState(0, 0)

    @property
    def finished(self) -> bool:
        """Whether the last step is saved. Reads every byte of its checkpoint to make sure."""
        steps = self.config.train.steps
        if self.newest is None or self.newest.step < steps:
            return False
        return first_whole(candidate_folders(self.run_dir), check=check_whole, warn=False)[1].step >= steps


def make_ready(config: RunConfig, *, world_size: int, device: str, warn: bool = False) -> Ready:
    """Check a run as far as one process can, and write nothing.

    Args:
        config: The run file with its overrides.
        world_size: All ranks.
        device: Device type of the ranks: cpu or cuda.
        warn: See `with_fixed_keys`.
    Raises:
        InputError: the ranks, the machine, the format of its exports, the run folder, the data or a checkpoint does
            not fit the run.
    """
    layout = Layout.of(config, world_size=world_size)
    require_device(config.train.precision, device=device, key="train.precision")
    check_backend(config.model, device=device)
    check_export_every(config)
    check_compiling(config.train.compile, device=device, environ=environment())
    run_dir = check_run_folder(config)
    config = with_fixed_keys(config, run_dir=run_dir, warn=warn)
    prepared = load_trainable(config, folder=data_folder(config))
    newest = newest_to_resume(config, run_dir=run_dir, warn=False)
    require_learning(config.train, trained=newest.step if newest else 0)
    rollbacks_of(run_dir)  # that they can be read
    branch = None if newest else check_beginning(config, prepared=prepared, warn=False)
    return Ready(config, run_dir, layout, prepared, newest, branch)


def finished_line(run_dir: Path, *, train: Train) -> str:
    """Return what is said of a run that has nothing left to train."""
    more, end = "raise train.steps to continue", zero_from(train)
    if end is not None and train.steps >= end:  # `require_learning` would refuse more
        full_until = SCHEDULES[train.schedule].fall_begins(train) or 0
        more = f"its learning rate has fallen to 0, so continue in {another_run(train, full_until=full_until)}"
    return f"{run_dir} is trained to its last step, {train.steps}: {more}"


def resume_line(run_dir: Path, *, step: int) -> str:
    """Return what a start would resume from."""
    return f"resumes from step {step}, {step_folder(checkpoints_folder(run_dir), step=step)}"


def branch_line(config: RunConfig, *, step: int) -> str:
    """Return what a first start of a branch would continue."""
    return f"branches off after step {step}, {config.train.branch_from}"


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
    if newest is not None and is_weights_only(newest):
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


def is_weights_only(manifest: Manifest) -> bool:
    """Return whether a checkpoint has no optimizer state, as imported models and averages have none."""
    kinds = {name.split(".")[1] for name in manifest.files if name.endswith(".safetensors")}
    return kinds == {"weight"}


def require_learning(train: Train, *, trained: int) -> None:
    """Refuse steps at a learning rate of 0.

    Args:
        train: The section of the run, with the keys that its first start fixed.
        trained: Steps that the run has taken.
    Raises:
        InputError: the run has more steps than its schedule, which ends at 0.
    """
    end = zero_from(train)
    if end is None or train.steps <= end:
        return
    more = f" or train.decay_steps to {train.steps}"
    changed = first_changed_step(train, train.model_copy(update={"decay_steps": train.steps}))
    if changed is not None and changed <= trained:
        more = f", or continue in {another_run(train, full_until=changed - 1)}"
    raise InputError(
        f"train.steps is {train.steps}, but from step {end} on the learning rate is 0 (train.decay_steps, fixed at the "
        f"first start, and train.min_learning_rate): nothing more would be learned; set train.steps to {end}{more}"
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


def check_beginning(config: RunConfig, *, prepared: Prepared | None, warn: bool = True) -> Manifest | None:
    """Check the checkpoint that a first start begins with; return its manifest if the run continues it as a branch.

    Args:
        config: The run.
        prepared: Its data; None if it is not prepared yet.
        warn: Whether to warn about broken checkpoints that are skipped; a start does when it loads one.
    Raises:
        InputError: see `check_init_from` and `check_branch`.
    """
    if config.train.init_from is not None:
        check_init_from(Path(config.train.init_from), config=config, prepared=prepared, warn=warn)
    if config.train.branch_from is None:
        return None
    return check_branch(Path(config.train.branch_from), config=config, prepared=prepared, warn=warn)


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
    folder, manifest = named_checkpoint(path, key="train.init_from", warn=warn)
    subject = f"train.init_from {folder}"
    _require_same_model(load_run(str(folder / CONFIG_NAME)).model, config.model, subject=subject)
    if prepared is not None and manifest.tokenizer_sha256 != prepared.tokenizer_sha256:
        raise InputError(
            f"{subject} has another tokenizer than the data in {prepared.folder}: "
            f"set data.tokenizer to {folder / manifest.tokenizer_name} and prepare in another data.dir"
        )
    if manifest.vocab_size != config.data.vocab_size:  # with the same tokenizer, rows that stand for no token
        raise InputError(
            f"{subject} has a vocabulary of {manifest.vocab_size}, the run has data.vocab_size "
            f"{config.data.vocab_size}: set it to {manifest.vocab_size}, and prepare in another data.dir"
        )


def check_branch(path: Path, *, config: RunConfig, prepared: Prepared | None, warn: bool = True) -> Manifest:
    """Return the manifest of the checkpoint that a run continues in a run folder of its own.

    Whether the samples that follow are the same is known for certain when it is loaded, by their hash.

    Args:
        path: A checkpoint or a run folder.
        config: The run.
        prepared: Its data; None if it is not prepared yet.
        warn: Whether to warn about broken checkpoints that are skipped.
    Raises:
        InputError: there is no checkpoint, it has no optimizer state or as many steps as the run, or it is of another
            model, optimizer or data.
    """
    folder, manifest = named_checkpoint(path, key="train.branch_from", warn=warn)
    subject, instead = f"train.branch_from {folder}", "or take its weights alone with train.init_from"
    source = load_run(str(folder / CONFIG_NAME))
    _require_same_model(source.model, config.model, subject=subject)
    if is_weights_only(manifest):
        raise InputError(
            f"{subject} has no optimizer state, as imported models and averages: use another checkpoint, {instead}"
        )
    if manifest.step >= config.train.steps:
        raise InputError(
            f"{subject} is of step {manifest.step}, and train.steps is {config.train.steps}: a branch goes on "
            f"counting, so set train.steps to more than {manifest.step}"
        )
    before, now = with_dotted_keys(source.model_dump()), with_dotted_keys(config.model_dump())
    for key in _SAME_IN_A_BRANCH:
        if before[key] != now[key]:
            raise InputError(
                f"{subject} was trained with {key} {as_yaml(before[key])}, the run has {as_yaml(now[key])}: a branch "
                f"continues with the same optimizer and the samples that follow; set {key} to that, {instead}"
            )
    if prepared is not None and (manifest.tokenizer_sha256, manifest.vocab_size) != (
        prepared.tokenizer_sha256,
        prepared.vocab_size,
    ):
        raise InputError(
            f"{subject} has another tokenizer than the data in {prepared.folder}: a branch continues on the data that "
            f"it was trained on; set data.dir to that, {instead}"
        )
    return manifest


def _require_same_model(seen: Model, wanted: Model, *, subject: str) -> None:
    if difference := model_difference(seen, wanted):
        key, before, now = difference
        raise InputError(f"{subject} has {key} {before}, the run has {now}: initial weights need the same model")
