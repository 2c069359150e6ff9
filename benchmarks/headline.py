"""Draw the perplexity of runs at one length against the time that each has trained.

    python -m benchmarks.headline RUN RUN ... --data TEXT [--length N] [--tokens N] [--picture PICTURE.png]

Each checkpoint that a run has kept is a point; its time is that of its steps, without validation and saving. So runs
compare at equal time, not only at equal steps: a run that trained at a shorter length takes less for as many tokens.
Times compare only between runs of one machine with nothing else on it. Prints a JSON line a run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.machine import print_result
from benchmarks.rounding import perplexity, tokens_of_text
from configs.paths import checkpoints_folder
from training.checkpoint.read import open_checkpoint
from training.evaluation.chart import head_axes, line_style, new_figure, save_figure
from training.metrics_reader import read_steps
from training.model.single import load_single
from training.step_columns import StepColumns


@dataclass(frozen=True)
class Progress:
    """How a run's perplexity fell with the time that it had trained.

    Attributes:
        name: Its position method and training length.
        seconds: Time at each checkpoint.
        perplexities: Perplexity of each checkpoint.
        step_seconds: Median time of a step.
        memory_gb: Most memory of its process, in GB.
    """

    name: str
    seconds: list[float]
    perplexities: list[float]
    step_seconds: float
    memory_gb: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each checkpoint of each run, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="a text, as for `trainshort evaluate --data`")
    parser.add_argument("--length", type=int, help="of the windows; by default the longest training length")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the text, at most")
    parser.add_argument("--picture", type=Path, default=Path("headline.png"))
    options = parser.parse_args(arguments)
    longest = max(open_checkpoint(run).config.data.sequence_length for run in options.runs)
    length = options.length or longest
    measured = [progress_of(run, text=options.data, length=length, most=options.tokens) for run in options.runs]
    for each in measured:
        print_result("headline", run=each.name, evaluated_at=length, **_figures(each))
    _draw(measured, length=length, text=options.data.name, picture=options.picture)


def progress_of(run: Path, *, text: Path, length: int, most: int) -> Progress:
    """Measure the checkpoints of a run.

    Args:
        run: Its folder.
        text: A text.
        length: Inputs of a window, in tokens.
        most: Tokens of the text that are predicted, at most.
    """
    newest, steps = open_checkpoint(run), [*read_steps(run)]
    tokens = tokens_of_text(newest, text)  # all checkpoints of a run have its tokenizer
    tokens = tokens[: min(most, len(tokens) - 1) // length * length + 1]
    seconds, perplexities = [], []
    for folder in sorted(checkpoints_folder(run).glob("step_*")):
        checkpoint = open_checkpoint(folder)
        seconds.append(sum(fields["step_seconds"] for fields in steps if fields["step"] <= checkpoint.manifest.step))
        perplexities.append(perplexity(load_single(checkpoint), tokens, length=length))
    name = f"{newest.config.model.position}, trained at {newest.config.data.sequence_length:,}"
    taken = StepColumns(("step_seconds", "memory_gb"), steps)
    return Progress(name, seconds, perplexities, median(taken.known("step_seconds")), max(taken.known("memory_gb")))


def _figures(progress: Progress) -> dict[str, object]:
    return {
        "seconds": [round(each, 1) for each in progress.seconds],
        "perplexity": [round(each, 3) for each in progress.perplexities],
        "median_step_seconds": round(progress.step_seconds, 4),
        "memory_gb": round(progress.memory_gb, 3),
    }


def _draw(measured: Sequence[Progress], *, length: int, text: str, picture: Path) -> None:
    figure = new_figure(inches=(7.0, 4.8))
    axes = figure.subplots()
    for number, each in enumerate(measured):
        axes.plot(each.seconds, each.perplexities, label=each.name, linewidth=1.8, markersize=5, **line_style(number))
        end = (each.seconds[-1], each.perplexities[-1])
        axes.annotate(f"{end[1]:.1f}", xy=end, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("training time, seconds")
    axes.set_ylabel("perplexity per token")
    head_axes(axes, heading=f"Perplexity at {length:,} tokens against training time", facts=f"{text}, nonoverlapping")
    axes.legend(frameon=False)
    save_figure(figure, picture)


if __name__ == "__main__":
    main()
