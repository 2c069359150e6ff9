"""README.md of an exported folder: the model card that the Hugging Face Hub shows. Imports no torch."""

import os
from pathlib import Path

from configs.figures import counted
from configs.schema import Train
from configs.step_sizes import batch_of
from configs.terminal import printable
from training.averaging.record import mean_of_steps
from training.evaluation.usable import whole_windows
from training.export.facts import ModelFacts, facts_of_context
from training.export.formats.readers import Reader

# The lines between the dashes are YAML that the Hub reads.
_FRONT_MATTER = """\
---
# Choose a licence that your data allows: https://huggingface.co/docs/hub/repositories-licenses
license: unknown
library_name: {library}
pipeline_tag: text-generation
tags:
- {position}
- {family}
- trainshort
---
"""
_LIMITS = """\
## Limits

- It continues text: it was not trained to follow instructions. It repeats what its data says, wrong or harmful.
"""


def model_card(facts: ModelFacts, *, comparison: str, engine: Reader, dtype: str, file: str = "") -> str:
    """Return the card.

    Args:
        facts: What to say of the model.
        comparison: How the exported model compared with the trained one.
        engine: What runs it.
        dtype: Type of its weights.
        file: Name of its file, if it has one.
    """
    model, name = facts.config.model, facts.config.run.name
    return "\n".join(
        (
            _FRONT_MATTER.format(library=engine.library, position=model.position, family=model.family),
            f"# {name}\n",
            f"A decoder language model with {model.position} positions, trained at {facts.train_length:,} tokens"
            f"{'' if facts.is_imported else ' by trainshort'}.",
            f"Longest text: {facts.longest:,} tokens, {facts.reason}.\n",
            *([] if facts.effective_context is None else [f"{facts_of_context(facts.effective_context)}\n"]),
            _training(facts, dtype=dtype),
            _perplexity(facts),
            engine.use.format(name=name, longest=facts.longest, more=2 * facts.longest, file=file),
            _LIMITS + engine.limits,
            f"Before this folder was written, it was loaded and compared with the trained model: {comparison}.\n",
            "[EXPORT.md](EXPORT.md) and export.json have the hashes of the files, the slopes, what must be computed in "
            "fp32, and what was verified with which versions.",
            "",
        )
    )


def _training(facts: ModelFacts, *, dtype: str) -> str:
    model, train, data = facts.config.model, facts.config.train, facts.config.data
    sources = ", ".join(_source_name(source.path) for source in data.sources)
    rows = {
        "parameters": f"{facts.parameters:,}",
        "shape": f"{model.layers} layers, hidden {model.hidden:,}, {model.heads} heads, feed-forward {model.inner:,}",
        "vocabulary": f"{facts.vocab_size:,} tokens",
        "positions": model.position,
        "training length": f"{facts.train_length:,} tokens",
    }
    if facts.is_imported:
        rows |= {"imported from": sources, "weights here": dtype}
    else:
        rows |= {
            "trained on": f"{facts.samples * data.sequence_length:,} tokens: {_steps(facts)}",
            **_beginning(train),
            "data": sources,
            "precision": f"{train.precision}; the weights here are {dtype}",
            "learning rate": f"{train.learning_rate:g} at most, {train.schedule}",
            "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}",
            "seed": f"{facts.config.run.seed}",
        }
    if facts.averaged:
        rows["weights"] = mean_of_steps(facts.averaged)
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(("## Training\n", "| | |", "|---|---|", *table, ""))


def _steps(facts: ModelFacts) -> str:
    """Return how many steps were taken, and how large they were; a branch does not know the steps of its trunk."""
    steps, train = counted(facts.step, "step"), facts.config.train
    if train.branch_from is not None:
        return steps
    return f"{steps} of {'up to ' * bool(train.batch_warmup)}{batch_of(facts.step, train):,} sequences"


def _beginning(train: Train) -> dict[str, str]:
    """Return what the run began with, if not with new weights."""
    named = {"began with the weights of": train.init_from, "branched off from": train.branch_from}
    return {name: _source_name(path) for name, path in named.items() if path is not None}


def _source_name(path: str) -> str:
    """Return how the card calls a source: as in the run file, but only the last part of a path of this machine."""
    name = Path(path).name if os.path.isabs(path) else path
    return f"`{printable(name).replace('`', '').replace('|', '')}`"


def _perplexity(facts: ModelFacts) -> str:
    if facts.report is None:
        why = facts.unmeasured or "run `trainshort evaluate` and export again"
        return f"## Perplexity by length\n\nNot measured: {why}.\n"
    report = facts.report.contents
    rows = [
        f"| {each['length']:,} | {each['length'] / facts.train_length:g} | {each['loss']:.4f} | "
        f"{each['perplexity']:,.2f} |"
        for each in whole_windows(report)
    ]
    tokens = f"{report['data']['tokens']:,} tokens of " if "tokens" in report["data"] else ""
    head = f"On {tokens}held-out text, cut into windows of each length that do not overlap; loss in nats per token.\n"
    table = ("| length | x training length | loss | perplexity |", "|---:|---:|---:|---:|", *rows)
    return "\n".join(("## Perplexity by length\n", head, *table, ""))
