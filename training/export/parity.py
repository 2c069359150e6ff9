"""Compare an exported model with the trained one: logits within a tolerance, token ids and decoded text exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from configs.errors import TrainshortError
from data_pipeline.portable import EDGE_CASE_TEXTS
from training.export.formats.table import TextTokenizer

# An export is compared at the training length and at this multiple of it.
COMPARED_MULTIPLE = 4
# relative to the largest logit, or to 1 if that is smaller
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LogitParity:
    """The difference between the exported model's logits and the trained model's.

    Attributes:
        lengths: Sequence lengths compared, in tokens.
        difference: The largest absolute difference.
        scale: The largest absolute logit.
        tolerance: The largest difference allowed.
    """

    lengths: tuple[int, ...]
    difference: float
    scale: float
    tolerance: float


@dataclass(frozen=True)
class Rounding:
    """What rounding the weights did to the logits.

    Attributes:
        difference: The largest absolute difference.
        divergence: Mean divergence of the rounded model's distribution of the next token from the trained one's
            (Kullback and Leibler), in nats.
        same: Share of the positions with the same likeliest token.
    """

    difference: float
    divergence: float
    same: float

    def __str__(self) -> str:
        return (
            f"rounding the weights changed logits by {self.difference:.2g} at most (mean divergence "
            f"{self.divergence:.1g} nats, likeliest token equal in {self.same:.2%})"
        )


def measure_rounding(before: torch.Tensor, after: torch.Tensor) -> Rounding | None:
    """Return what changed from one model's logits to another's, [1, seq, vocab] each; None if nothing did."""
    if torch.equal(before, after):
        return None
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (before, after))
    return Rounding(
        difference=(before - after).abs().max().item(),
        divergence=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        same=(before.argmax(-1) == after.argmax(-1)).double().mean().item(),
    )


def compare_logits(
    trained: Callable[[torch.Tensor], torch.Tensor],
    *,
    exported: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    lengths: Sequence[int],
) -> LogitParity:
    """Compare the logits of an exported model with those of the trained model.

    Args:
        trained: The trained model: [1, seq] int64 to [1, seq, vocab] fp32.
        exported: The exported model, likewise.
        tokens: The text, [tokens], int64; at least the longest length.
        lengths: Lengths to compare; each sequence starts at the first token.
    Raises:
        TrainshortError: logits differ by more than `LOGIT_TOLERANCE`.
    """
    differences, scale = [], 0.0
    with torch.no_grad():
        for length in lengths:
            batch = tokens[None, :length]  # [1, length]
            logits = trained(batch)
            differences.append((logits - exported(batch)).abs_().max())
            scale = max(scale, logits.abs().max().item())
    # torch's max returns nan if any value is nan; Python's may not.
    difference = torch.stack(differences).max().item()
    parity = LogitParity(tuple(lengths), difference, scale, LOGIT_TOLERANCE * max(1.0, scale))
    # `not <=` instead of `>`: nan must fail too.
    if not difference <= parity.tolerance:
        raise TrainshortError(
            f"the exported model's logits differ from the trained model's by {difference:.3g} at lengths "
            f"{', '.join(map(str, lengths))} (allowed {parity.tolerance:.3g}, largest logit {scale:.3g}): "
            "nothing was exported; report this"
        )
    return parity


def compare_tokenizers(
    trained: TextTokenizer, *, exported: TextTokenizer, texts: Sequence[str] = EDGE_CASE_TEXTS
) -> int:
    """Compare token ids and decoded text of two tokenizers; return the number of texts compared.

    Raises:
        TrainshortError: the exported tokenizer gives other ids for a text, or decodes the ids to another text.
    """
    for text in texts:
        ids, exported_ids = trained.encode(text), exported.encode(text)
        if ids != exported_ids:
            raise TrainshortError(
                f"the exported tokenizer gives other ids for {text[:60]!r}: {exported_ids[:12]}, not {ids[:12]}: "
                "nothing was exported; report this"
            )
        if exported.decode(ids) != trained.decode(ids):
            raise TrainshortError(
                f"the exported tokenizer gives back another text for {text[:60]!r}: nothing was exported; report this"
            )
    return len(texts)
