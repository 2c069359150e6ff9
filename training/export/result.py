"""An exported folder, and how it compared with the trained model. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.export.facts import ModelFacts
from training.export.formats.table import LengthLimit

if TYPE_CHECKING:
    from training.export.parity import LogitParity, Rounding
    from training.tracking.registry import RegisteredVersion


@dataclass(frozen=True)
class ServedText:
    """A greedy completion by a server that ran the exported model.

    Attributes:
        server: The server.
        version: Its version; None if it is not known.
        tokens: New tokens whose text was found equal to the trained model's.
        asked: New tokens of the trained model; where fewer are equal, two were as likely.
    """

    server: str
    version: str | None
    tokens: int
    asked: int

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        less = "" if self.tokens == self.asked else f" of {self.asked}, up to two that are as likely"
        return f"{self.server}{version} serves {self.tokens} equal greedy tokens{less}"


@dataclass(frozen=True)
class ExportResult:
    """An exported folder, and how it compared with the trained model.

    Attributes:
        folder: The exported folder.
        facts: What its model card says of the model.
        logits: The difference between its logits and those of the trained model with its weights rounded likewise.
        rounding: What rounding the weights changed at the training length; None if nothing.
        wanted_length: The longest length to compare.
        limit: The longest length that the format's reader can run; `logits.lengths` stops there.
        texts: Texts whose token ids were found equal.
        continued: New tokens of a greedy continuation that were found equal.
        served: What a server gave, if one was asked.
        held_out: Whether the logits are of held-out text; otherwise of random tokens.
        registered: Its version in MLflow's Model Registry; None if it was not registered.
    """

    folder: Path
    facts: ModelFacts
    logits: "LogitParity"
    rounding: "Rounding | None"
    wanted_length: int
    limit: LengthLimit
    texts: int
    continued: int
    served: ServedText | None
    held_out: bool
    registered: "RegisteredVersion | None" = None

    @property
    def comparison(self) -> str:
        """How the exported model compared with the trained one, in words."""
        lengths = " and ".join(map(str, self.logits.lengths))
        limited = self.logits.lengths[-1] < self.wanted_length
        shortened = f" (not {self.wanted_length}: {self.limit.reason})" if limited else ""
        return (
            f"at lengths {lengths}{shortened} logits differ by {self.logits.difference:.2g} at most "
            f"(largest {self.logits.scale:.3g}, allowed {self.logits.tolerance:.2g}) on "
            f"{'held-out text' if self.held_out else 'random tokens'}; {self.texts} texts have equal token ids, "
            f"{self.continued} greedy tokens are equal"
            f"{'' if self.served is None else f'; {self.served}'}"
            f"{'' if self.rounding is None else f'; {self.rounding}'}"
        )

    def __str__(self) -> str:
        return f"{self.folder}: {self.comparison}"
