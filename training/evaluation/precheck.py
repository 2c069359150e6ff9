"""What `evaluate` can refuse without torch, which takes seconds to import; and the run's data, checked."""

from pathlib import Path

from configs.commands import run_file_named
from configs.errors import InputError
from configs.load import load_run
from configs.paths import config_file, own_data_folder, started_in
from configs.positions import scale_for
from configs.precisions import require_precision
from configs.protocols import parse_protocol
from configs.rules import problems
from configs.saved import overrides_here
from configs.scales import parse_scale
from configs.schema import Data, RunConfig
from data_pipeline.manifest import Prepared, load_prepared
from data_pipeline.text import require_text_file
from parallel.compilers import check_cache_folder
from parallel.layout import Layout
from parallel.start import environment
from training.checkpoint.manifest import CONFIG_NAME, read_manifest, require_checkpoint
from training.evaluation.request import EvaluationRequest
from training.evaluation.windows import require_fit


def check_request(checkpoint: Path, request: EvaluationRequest) -> None:
    """Refuse an evaluation whose checkpoint, text, lengths or protocols are wrong, as far as that needs no model.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure.
    Raises:
        InputError: names what is wrong.
    """
    require_precision(request.precision)
    parsed = [parse_protocol(name) for name in request.protocols or ()]
    if request.scale is not None:
        _check_scale(request.scale, request)
    folder = require_checkpoint(checkpoint)
    config = load_run(str(folder / CONFIG_NAME))
    if request.scale is not None:
        scale_for(request.scale, config.model)
    for protocol in parsed:
        for length in request.lengths or config.evaluation_lengths:
            require_fit(protocol, length=length)
    if request.hf is not None and not (request.hf / "config.json").is_file():
        raise InputError(
            f"{request.hf} has no config.json: give a folder with a causal model of Hugging Face; nothing is downloaded"
        )
    if request.data is not None:
        require_text_file(request.data)
    else:
        run_data(folder, config=config)


def chosen_splits(checkpoint: Path, *, tensor: int | None, pipeline: int | None, hf: Path | None) -> tuple[int, int]:
    """Return the tensor ranks and the stages of an evaluation: each as given, else as the checkpoint's run file says.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        tensor: Value of `--tensor`; None if it was not given.
        pipeline: Value of `--pipeline`, likewise.
        hf: Value of `--hf`: the run file says nothing of another model, which is measured in one process.
    Raises:
        InputError: there is no such checkpoint.
    """
    if hf is not None or (tensor and pipeline):
        return tensor or 1, pipeline or 1
    evaluate = load_run(str(require_checkpoint(checkpoint) / CONFIG_NAME)).evaluate
    return tensor or evaluate.tensor, pipeline or evaluate.pipeline


def evaluation_layout(request: EvaluationRequest) -> Layout:
    """Return the layout of the ranks that an evaluation runs on."""
    return Layout(tensor=request.tensor, pipeline=request.pipeline, data=1, zero=1, micro_batches=1)


def check_ranks(checkpoint: Path, request: EvaluationRequest, *, started: int | None, gpus: int) -> None:
    """Refuse a layout that does not fit the model or this machine.

    Args:
        checkpoint: A step folder, or a run folder for its newest checkpoint.
        request: What to measure, and on which ranks.
        started: Ranks that srun or torchrun has started; None if they are still to be started here.
        gpus: GPUs of this machine.
    Raises:
        InputError: it does not fit.
    """
    tensor, pipeline = request.tensor, request.pipeline
    options, ranks = f"--tensor {tensor} --pipeline {pipeline}", evaluation_layout(request).world_size
    if started not in (None, ranks):
        raise InputError(
            f"evaluate runs on --tensor x --pipeline ranks ({tensor} x {pipeline} = {ranks}), but {started} were "
            f"started: start {ranks}, or change --tensor and --pipeline"
        )
    if ranks == 1:
        return
    config = load_run(str(require_checkpoint(checkpoint) / CONFIG_NAME))
    if (config.evaluate.tensor, config.evaluate.pipeline) == (tensor, pipeline):
        options += " (evaluate.tensor and evaluate.pipeline of the run)"
    for name, given in (("--hf", request.hf), ("--scale", request.scale)):
        if given is not None:
            raise InputError(
                f"{name} measures in one process, so it does not go with {options}: use --tensor 1 --pipeline 1"
            )
    if started is None and 0 < gpus < ranks:
        raise InputError(
            f"{options} needs {ranks} GPUs, and this machine has {gpus}: lower one of them, or set "
            'CUDA_VISIBLE_DEVICES="" for CPU ranks'
        )
    check_cache_folder(environment())
    split = config.evaluate.model_copy(update={"tensor": tensor, "pipeline": pipeline})
    if broken := problems(config.model_copy(update={"evaluate": split})):
        raise InputError(
            "; ".join(broken).replace("evaluate.tensor", "--tensor").replace("evaluate.pipeline", "--pipeline")
        )


def _check_scale(scale: str, request: EvaluationRequest) -> None:
    """Refuse an unknown scale, and one together with an option that it does not go with."""
    parse_scale(scale)
    if request.hf is not None:
        raise InputError(f"--scale {scale} is for a checkpoint's positions, and --hf measures another model: drop one")
    if request.context:
        raise InputError(
            f"--context measures positions as trained, and --scale {scale} changes them: drop one of them, or use "
            "--protocol last:TOKENS --same-tokens"
        )


def run_data(checkpoint: Path, *, config: RunConfig) -> Prepared:
    """Load the prepared data of the run that saved a checkpoint.

    Args:
        checkpoint: The checkpoint's folder, in its run folder.
        config: The run as the checkpoint holds it.
    Raises:
        InputError: the data is missing, or is not what the checkpoint was trained on.
    """
    if not read_manifest(checkpoint).step:
        raise InputError(f"{checkpoint} is an imported model, which has no held-out text: give a text with --data")
    file, data, folder = locate_data(checkpoint, config=config)
    with run_file_named(str(file), overrides_here(file, checkpoint.parent.parent)):
        prepared = load_prepared(data, folder=folder)
    # Without this check, another tokenizer's ids would be scored as other text, without an error.
    if read_manifest(checkpoint).tokenizer_sha256 != prepared.tokenizer_sha256:
        raise InputError(
            f"data in {folder} was prepared again with another tokenizer than that of {checkpoint}: "
            "its token ids stand for other text; give a text with --data"
        )
    return prepared


def locate_data(checkpoint: Path, *, config: RunConfig) -> tuple[Path, Data, Path]:
    """Return the run file that says where the data of a checkpoint's run is, its `data` section, and the data's folder.

    Args:
        checkpoint: The checkpoint's folder, in its run folder.
        config: The run as the checkpoint holds it.
    """
    run_dir = checkpoint.parent.parent
    # The newest start's: the data may have been moved since the checkpoint was saved.
    newest = config_file(run_dir)
    file, run = (newest, load_run(str(newest))) if newest.is_file() else (checkpoint / CONFIG_NAME, config)
    if run.data.dir is None:
        # Not run.dir of the configuration: the run folder may have been moved.
        return file, run.data, own_data_folder(run_dir)
    folder = Path(run.data.dir)
    there = started_in(run_dir, named=run.run.dir) / folder
    return file, run.data, there if there.is_dir() and not folder.exists() else folder
