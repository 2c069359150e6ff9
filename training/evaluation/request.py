"""What a user asks `evaluate` for. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from configs.precisions import DEFAULT_PRECISION
from configs.schema import RunConfig


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of `trainshort evaluate`.

    Attributes:
        lengths: Lengths in tokens; None for the run's.
        protocols: nonoverlapping, sliding:STRIDE or last:TOKENS; None for the run's.
        data: A text file; None for the run's held-out text.
        same_tokens: Whether all lengths of a protocol score the same tokens.
        context: Whether to measure how much context is used.
        hf: A folder with a model of Hugging Face to measure instead; None to measure the checkpoint's.
        scale: Value of `--scale`, as in `configs.scales`; None to leave positions as trained.
        precision: Value of `--precision`, whatever the checkpoint trained in.
        tensor, pipeline: Ranks that share each layer, and stages that share the layers.
        command: The command line, to be named in the report; None if no command asks.
    """

    lengths: tuple[int, ...] | None = None
    protocols: tuple[str, ...] | None = None
    data: Path | None = None
    same_tokens: bool = False
    context: bool = False
    hf: Path | None = None
    scale: str | None = None
    precision: str = DEFAULT_PRECISION
    tensor: int = 1
    pipeline: int = 1
    command: str | None = None


def options_of_run(config: RunConfig) -> list[str]:
    """Return the options of `trainshort evaluate` with which it measures what a run file says, as the file says.

    Without them the command goes by the checkpoint's copy of the file, which may be older.
    """
    lengths, evaluate = ",".join(map(str, config.evaluation_lengths)), config.evaluate
    protocols = [word for protocol in evaluate.protocols for word in ("--protocol", protocol)]
    ranks = ["--tensor", str(evaluate.tensor), "--pipeline", str(evaluate.pipeline)]
    return ["--lengths", lengths, *protocols, *ranks]
