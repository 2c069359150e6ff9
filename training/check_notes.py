"""What `check` says of a valid run file: what `prepare` and `train` would refuse, resume or not use.

A user types `check` often: what takes a tenth of a second to import, numpy first, is imported where it is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.choices import OPTIMIZERS
from configs.errors import InputError, TrainshortError, not_prepared
from configs.paths import (
    MANIFEST_NAME,
    check_run_folder,
    checkpoints_folder,
    config_file,
    data_folder,
    run_folder,
)
from configs.schema import Data, RunConfig, Train
from data_pipeline.sources import check_source, require_tokenizer
from parallel.compilers import check_compiling

if TYPE_CHECKING:
    from data_pipeline.manifest import Prepared

OPENED_FILES = 50
"""Files of a source whose beginning is read: a corpus may have a hundred thousand."""


def check_notes(config: RunConfig, *, device: str, environ: Mapping[str, str]) -> list[str]:
    """Return what `prepare` and `train` would refuse, resume or not use, a line each. Reads little, writes nothing.

    Args:
        config: The run file with its overrides.
        device: Device type of this machine's ranks: cpu or cuda.
        environ: The environment, which may name the MLflow store and torch's folder of what it compiled.
    """
    prepared: list[Prepared] = []
    checks = (
        partial(_start, config, prepared=prepared),
        partial(_check_store, config, environ),
        partial(check_compiling, config.train.compile, device=device, environ=environ),
    )
    return [
        *_data_notes(config, prepared),
        *(note for check in checks for note in _answer(check)),
        *_unused_notes(config.train),
    ]


def _unused_notes(train: Train) -> Iterator[str]:
    """Yield what has no effect, and is legal: studies change the optimizer alone."""
    if (
        train.momentum != Train.model_fields["momentum"].default
        and OPTIMIZERS[train.optimizer].moments_of_matrices is None
    ):
        using = " or ".join(row.name for row in OPTIMIZERS.values() if row.moments_of_matrices is not None)
        yield (
            f"train.momentum is {train.momentum}, but train.optimizer {train.optimizer} does not use it: remove it, or "
            f"set train.optimizer to {using}"
        )


def _data_notes(config: RunConfig, prepared: "list[Prepared]") -> Iterator[str]:
    """Yield what is wrong with the sources, the tokenizer and the data; append the data if nothing is."""
    data, folder = config.data, data_folder(config)
    inputs = list(_input_notes(data))
    if _is_missing(folder / MANIFEST_NAME):  # before the slow imports below
        yield from (*inputs, str(not_prepared(folder)))
        return

    from data_pipeline.counts import check_index, load_trainable
    from data_pipeline.manifest import check_inputs, describe_inputs
    from data_pipeline.manifest_file import read_data_manifest

    try:
        prepared.append(load_trainable(config, folder=folder))
    except (InputError, OSError) as error:
        yield from (*inputs, _words(error))
        return
    yield from _answer(partial(check_index, config, prepared[0]))
    manifest = read_data_manifest(folder)
    assert manifest is not None, "it was loaded"
    for note in inputs or _answer(lambda: check_inputs(manifest, describe_inputs(data), folder=folder)):
        yield f"{note} (training does without: its data is prepared)"


def _is_missing(file: Path) -> bool:
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # closed to this user, which the reader says
        return False
    return False


def _input_notes(data: Data) -> Iterator[str]:
    """Yield what `prepare` would refuse of the sources and the tokenizer."""
    checks = [partial(check_source, source.path, most_files=OPENED_FILES) for source in data.sources]
    notes = [note for check in (*checks, partial(require_tokenizer, data)) for note in _answer(check)]
    yield from notes
    if not notes and len(data.sources) > 1:  # all are there, and may name the same file
        from data_pipeline.manifest import describe_inputs

        yield from _answer(partial(describe_inputs, data))


def _start(config: RunConfig, *, prepared: "list[Prepared]") -> str | None:
    """Return what a start would resume from; None at a first start.

    Raises:
        InputError: the run folder or a checkpoint does not fit the run.
    """
    run_dir, train = check_run_folder(config), config.train
    is_new = not (config_file(run_dir).exists() or checkpoints_folder(run_dir).exists())
    if is_new and train.init_from is None and train.branch_from is None:
        if train.decay_steps is not None:  # else the first start sets it to train.steps
            from training.preflight import require_learning

            require_learning(train, trained=0)
        return None

    from training.folder import with_fixed_keys
    from training.preflight import (
        branch_line,
        check_beginning,
        finished_line,
        newest_to_resume,
        require_learning,
        resume_line,
    )
    from training.rollbacks import rollbacks_of

    config = with_fixed_keys(config, run_dir=run_dir)
    newest = newest_to_resume(config, run_dir=run_dir)
    require_learning(config.train, trained=newest.step if newest else 0)
    rollbacks_of(run_dir)  # that they can be read
    if newest is None:
        branch = check_beginning(config, prepared=next(iter(prepared), None))
        return None if branch is None else f"training {branch_line(config, step=branch.step)}"
    if newest.step == config.train.steps:
        return finished_line(run_dir, train=config.train)
    return f"training {resume_line(run_dir, step=newest.step)}"


def _check_store(config: RunConfig, environ: Mapping[str, str]) -> None:
    from training.tracking.store import choose_store, require_known_scheme

    require_known_scheme(choose_store(config.track.uri, run_dir=run_folder(config), environ=environ))


def _answer(check: Callable[[], object]) -> Iterator[str]:
    """Yield what a check refuses, or the text that it returns."""
    try:
        answer = check()
    except (TrainshortError, OSError) as error:
        answer = _words(error)
    if isinstance(answer, str):
        yield answer


def _words(error: TrainshortError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read ({error.strerror}): check its mode"
    return str(error)
