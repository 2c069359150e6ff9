"""What a model card says of a model. Imports no torch."""

from dataclasses import dataclass

from configs.figures import counted
from configs.schema import RunConfig
from training.evaluation.usable import HeldOutReport, usable_length, whole_windows
from training.evaluation.verdict import measured_context


def facts_of_context(effective: int) -> str:
    """Return what the cards say of the effective context, in a sentence."""
    return (
        f"Effective context: {counted(effective, 'token')}; with no more context, perplexity on held-out text is "
        "within 1 % of the best."
    )


@dataclass(frozen=True)
class ModelFacts:
    """How an exported model was trained, and what was measured of it.

    Attributes:
        config: The run that trained it.
        step: Optimizer steps taken.
        samples: Sequences that it was trained on.
        vocab_size: Tokens, without padding.
        parameters: Number of parameters; the tied embedding counts once.
        train_length: Tokens of a sequence of its step, which train.length_warmup may have cut.
        report: What was measured of it on held-out text; None if nothing was.
        averaged: Steps of the checkpoints that its weights are the mean of; none if they are no mean.
    """

    config: RunConfig
    step: int
    samples: int
    vocab_size: int
    parameters: int
    train_length: int
    report: HeldOutReport | None
    averaged: tuple[int, ...] = ()

    @property
    def is_imported(self) -> bool:
        """Whether the model was trained elsewhere: `trainshort import` makes a checkpoint of step 0."""
        return self.step == 0

    @property
    def longest(self) -> int:
        """The longest text that the model should be served with, in tokens: see `usable_length`."""
        return max(self.train_length, usable_length(self.report.contents) if self.report else 0)

    @property
    def effective_context(self) -> int | None:
        """Tokens of context that it was measured to use; None if that was not measured."""
        return measured_context(self.report.contents) if self.report else None

    @property
    def unmeasured(self) -> str | None:
        """Why `evaluate` cannot measure the exported model; None if it can."""
        if self.is_imported:
            return "its perplexity by length was not measured, as an imported model has no held-out text"
        masked = "its perplexity by length is measured with masked documents, and an export masks none"
        return masked if self.config.data.mask_documents else None

    @property
    def reason(self) -> str:
        """Where `longest` comes from, in words that follow it and a comma."""
        if self.report is None:
            return f"the training length: {self.unmeasured or 'its perplexity by length was not measured'}"
        if self.longest > self.train_length:
            return "the longest whose perplexity on held-out text is within 1 % of the best"
        measured = whole_windows(self.report.contents)[-1]["length"]
        is_longest = measured <= self.train_length
        why = "no longer text was measured" if is_longest else "no longer text is within 1 % of the best perplexity"
        return f"the training length: {why}"
