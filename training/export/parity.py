"""Whether an exported folder says what the trained model says: logits and token ids, as transformers reads them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from configs.errors import TrainshortError

# of the largest logit, or of 1 where that is smaller
LOGIT_TOLERANCE = 1e-4
# transformers' Bloom holds heads x length x length scores of a layer at once
_MOST_SCORE_BYTES = 2_000_000_000

TRICKY = (
    "", " ", "  ", "   leading", "trailing   ", "a  b   c", "\n", "\r\n", "\n\n\n", "\t", "\tx\t", " \n ", "\x00",
    "a\x00b", "\x7f", "\u00a0nbsp", "\u2003em", "\u200b", "\ufeffbom", "naïve café", "e\u0301 é", "ﬁ ﬀ", "Ⅷ ½ ①",
    "ＦＵＬＬ width", "Ångström Å", "straße ẞ", "İstanbul ı", "Ελληνικά", "русский", "עברית", "العربية", "हिन्दी",
    "ไทย", "日本語テキスト", "中文", "한국어", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "𝔘𝔫𝔦", "\U0010ffff",
    "<s>", "</s>", "<unk>", "<s> a </s>", "<0x41>",
    "<0x0A>", "<pad>", "def f(x):\n    return x**2  # square\n", "if (a&&b){c[i]+=--d;}", '{"k": [1, 2.5e-3, null]}',
    "https://example.org/a?b=c&d=%20#e", "C:\\path\\to", "'quoted' \"twice\" `thrice`", "a" * 40, " " * 40, "=" * 70,
    "ab" * 30, "12345678901234567890", "3.14159", "1,000,000.00", "ALL CAPS camelCase snake_case kebab-case", "…—–“”",
    "The quick brown fox jumps over the lazy dog.", "Sentence one. Sentence two!  Three?\nNew line.",
)  # fmt: skip


class Encoder(Protocol):
    """What the comparison asks of the trained model's tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
        ...


@dataclass(frozen=True)
class LogitParity:
    """How far the folder's logits are from the trained model's.

    Attributes:
        lengths: Tokens compared.
        difference: The largest absolute difference.
        scale: The largest absolute logit.
        tolerance: The largest difference allowed.
    """

    lengths: tuple[int, ...]
    difference: float
    scale: float
    tolerance: float


def comparable_length(length: int, *, heads: int) -> int:
    """Return the length at which transformers' attention scores stay within memory, at most `length`."""
    return min(length, math.isqrt(_MOST_SCORE_BYTES // (4 * heads)))


def compare_logits(
    folder: Path, *, logits: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, lengths: Sequence[int]
) -> LogitParity:
    """Compare the logits of a folder, loaded by transformers in fp32, with the trained model's.

    Args:
        folder: The exported folder.
        logits: The trained model: [1, seq] int64 to [1, seq, vocab] fp32.
        tokens: At least as many as the longest length, [tokens], int64.
        lengths: Tokens to compare, from the first on.
    Raises:
        TrainshortError: weights are missing, or logits differ by more than `TOLERANCE`.
    """
    exported = load_exported(folder)
    differences, scale = [], 0.0
    with torch.no_grad():
        for length in lengths:
            batch = tokens[None, :length]
            ours = logits(batch)
            theirs = exported(input_ids=batch, use_cache=False).logits
            differences.append((ours - theirs).abs_().max())
            scale = max(scale, ours.abs().max().item())
    # torch's max, unlike Python's, gives nan where one is nan
    difference = torch.stack(differences).max().item()
    parity = LogitParity(tuple(lengths), difference, scale, LOGIT_TOLERANCE * max(1.0, scale))
    if not difference <= parity.tolerance:
        raise TrainshortError(
            f"the exported model's logits differ from the trained model's by {difference:.3g} at lengths "
            f"{', '.join(map(str, lengths))} (allowed {parity.tolerance:.3g}, largest logit {scale:.3g}): "
            "nothing was exported; report this"
        )
    return parity


def compare_tokenizers(folder: Path, *, tokenizer: Encoder, texts: Sequence[str]) -> int:
    """Compare token ids and decoded text of a folder's tokenizer with the trained model's; return the texts compared.

    Raises:
        TrainshortError: a text has other ids, or its ids another text.
    """
    with quiet_transformers():
        exported = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for text in texts:
            ours = tokenizer.encode(text)
            # sentencepiece never takes text for a control piece; transformers does unless told
            theirs = exported(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if ours != theirs:
                raise TrainshortError(
                    f"the exported tokenizer gives other ids for {text[:60]!r}: {theirs[:12]}, not {ours[:12]}: "
                    "nothing was exported; report this"
                )
            if exported.decode(ours) != tokenizer.decode(ours):
                raise TrainshortError(
                    f"the exported tokenizer gives back another text for {text[:60]!r}: nothing was exported; "
                    "report this"
                )
    return len(texts)


def load_exported(folder: Path) -> Any:
    """Return an exported folder's model as transformers loads it, in fp32.

    Raises:
        TrainshortError: transformers misses weights, or does not know some.
    """
    loader: Any = transformers.AutoModelForCausalLM  # its types leave out output_loading_info
    with quiet_transformers():
        model, found = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    wrong = sorted(found["missing_keys"]) + sorted(found["unexpected_keys"]) + sorted(found["mismatched_keys"])
    if wrong:
        raise TrainshortError(f"transformers cannot place these weights of the export: {wrong[:5]}; report this")
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and remarks off the standard error stream."""
    logging: Any = transformers.utils.logging  # untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
