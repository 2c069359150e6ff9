"""What was measured at one task, length and depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from training.retrieval.scoring import PromptScore
from training.retrieval.shares import wilson_interval


@dataclass(frozen=True)
class RetrievalCell:
    """The scores of one task, length and depth.

    Attributes:
        task: Name of the task.
        length: Tokens of prompt and answer.
        depth: Where the asked needle lay, from 0 to 1; None for needles at random places.
        scores: Scores of each prompt.
    """

    task: str
    length: int
    depth: float | None
    scores: Sequence[PromptScore]

    def to_json(self) -> dict[str, Any]:
        """Return it as a result of the report."""
        recall = fmean(score.recall for score in self.scores)
        choice = fmean(score.choice for score in self.scores)
        return {
            "task": self.task,
            "length": self.length,
            "depth": self.depth,
            "prompts": len(self.scores),
            "recall": recall,
            "recall_interval": list(wilson_interval(recall, trials=len(self.scores))),
            "choice": choice,
            "choice_interval": list(wilson_interval(choice, trials=len(self.scores))),
            "log_probability": fmean(score.log_probability for score in self.scores),
            "margin": fmean(score.margin for score in self.scores),
            "generated": self.scores[0].generated,
        }
