"""Compare an exported model with the trained one: logits within a tolerance, token ids and decoded text exactly.

A greedy continuation is compared too. Where two tokens are as likely but for the tolerance, either may come next, and
what follows is not compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from configs.errors import TrainshortError
from data_pipeline.portable import EDGE_CASE_TEXTS
from data_pipeline.tokenizer import Tokenizer
from training.export.formats.table import ExportedModel, TextTokenizer

# An export is compared at the training length and at this multiple of it.
COMPARED_MULTIPLE = 4
# relative to the largest logit, or to 1 if that is smaller
LOGIT_TOLERANCE = 1e-4
# what the bytes of an incomplete character decode to
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


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
class Continuation:
    """The greedy continuation of a text by the trained model.

    Attributes:
        prompt: The text.
        prompt_ids: Its token ids.
        ids: Ids of the new tokens; the last may be the end of the document.
        logits: What each was chosen from, [tokens, vocab] fp32.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logits: torch.Tensor

    def as_likely(self, place: int, *, tolerance: float) -> list[int]:
        """Return the tokens that are as likely at a place as the likeliest one, but for a tolerance of the logits."""
        (ids,) = torch.where(self.logits[place] >= self.logits[place].max() - tolerance)
        return ids.tolist()


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


def compare_logits(expected: Sequence[torch.Tensor], *, exported: ExportedModel, tokens: torch.Tensor) -> LogitParity:
    """Compare the logits of an exported model with those of the trained model.

    Args:
        expected: The trained model's logits of the first tokens, [1, length, vocab] fp32 for each length to compare.
        exported: The exported model.
        tokens: The text, [tokens], int64; at least the longest length.
    Raises:
        TrainshortError: logits differ by more than `LOGIT_TOLERANCE`.
    """
    lengths = tuple(logits.shape[1] for logits in expected)
    differences, scale = [], 0.0
    with torch.no_grad():
        for length, logits in zip(lengths, expected, strict=True):
            differences.append(exported(tokens[None, :length]).sub_(logits).abs_().max())
            scale = max(scale, logits.abs().max().item())
    # torch's max returns nan if any value is nan; Python's may not.
    difference = torch.stack(differences).max().item()
    parity = LogitParity(lengths, difference, scale, LOGIT_TOLERANCE * max(1.0, scale))
    # `not <=` instead of `>`: nan must fail too.
    if not difference <= parity.tolerance:
        raise TrainshortError(
            f"the exported model's logits differ from the trained model's by {difference:.3g} at lengths "
            f"{', '.join(map(str, lengths))} (allowed {parity.tolerance:.3g}, largest logit {scale:.3g}): "
            "nothing was exported; report this"
        )
    return parity


def compare_continuations(expected: Continuation, ids: Sequence[int], *, tolerance: float) -> int:
    """Compare a greedy continuation by the exported model with the trained model's; return the equal tokens.

    Args:
        expected: The trained model's.
        ids: Ids of the exported model's new tokens.
        tolerance: Logits that differ by less may be in either order.
    Raises:
        TrainshortError: it differs, and not for logits that are as good as equal.
    """
    for place, (ours, theirs) in enumerate(zip_longest(expected.ids, ids)):
        if theirs == ours:
            continue
        if ours is not None and theirs in expected.as_likely(place, tolerance=tolerance):
            return place
        raise TrainshortError(
            f"the exported model continues a text with the tokens {list(ids[: place + 1])}, the trained model with "
            f"{list(expected.ids[: place + 1])}: nothing was exported; report this"
        )
    return len(expected.ids)


def compare_text(expected: Continuation, text: str, *, tokenizer: Tokenizer, tolerance: float, engine: str) -> int:
    """Compare the text of a greedy continuation with the trained model's; return the tokens found equal.

    Args:
        expected: The trained model's continuation.
        text: The new text.
        tokenizer: The trained model's tokenizer.
        tolerance: Logits that differ by less may be in either order.
        engine: What gave the text, for the message.
    Raises:
        TrainshortError: it differs, and not for logits that are as good as equal.
    """

    def follows(ids: Sequence[int]) -> bool:
        """Return whether the text begins like these tokens, or ends with them at the end of the document."""
        start = tokenizer.decode(ids).rstrip(_INCOMPLETE)
        return text == start if ids[-1] == tokenizer.end_of_document else text.startswith(start)

    for place in range(len(expected.ids)):
        if not follows(expected.ids[: place + 1]):
            likely = expected.as_likely(place, tolerance=tolerance)
            if any(follows([*expected.ids[:place], other]) for other in likely):
                return place
            raise TrainshortError(
                f"{engine} continues {expected.prompt[-40:]!r} with {text[:80]!r}, the trained model with "
                f"{tokenizer.decode(expected.ids)[:80]!r}: nothing was exported; report this"
            )
    return len(expected.ids)


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
