"""Check that other runtimes encode text as a sentencepiece BPE model does: what cannot be exported is not trained."""

import tokenizers
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE

from configs.errors import InputError
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.vocabulary import PieceType, Vocabulary, read_vocabulary

# sentencepiece's mark for a space inside a piece
_SPACE = "\u2581"

# White space, normalization, byte fallback, special tokens spelled out, code: where two tokenizers may differ.
EDGE_CASE_TEXTS = (
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


def check_portable(tokenizer: Tokenizer) -> None:
    """Compare a tokenizer with the one that an export of its model would hold.

    The texts are `EDGE_CASE_TEXTS` and the user-defined symbols of the model, alone and inside other text.

    Raises:
        InputError: the exported tokenizer would give other ids for a text, or decode them to another text.
    """
    vocabulary = read_vocabulary(tokenizer.path)
    exported = build_tokenizer(vocabulary)
    exported.encode_special_tokens = True  # a control piece that is spelled out in a text is plain text
    symbols = [piece.text.replace(_SPACE, " ") for piece in vocabulary.pieces if piece.type is PieceType.USER_DEFINED]
    for text in (*EDGE_CASE_TEXTS, *symbols, *(f"a{symbol}b {symbol}{symbol} c" for symbol in symbols)):
        ids, exported_ids = tokenizer.encode(text), exported.encode(text, add_special_tokens=False).ids
        if ids != exported_ids or tokenizer.decode(ids) != exported.decode(ids, skip_special_tokens=False):
            raise InputError(
                f"tokenizer {tokenizer.path} would encode differently in other runtimes, so the model could not be "
                f"exported: it gives {ids[:8]} for {text[:40]!r}, and they give {exported_ids[:8]}; use one without "
                "user-defined symbols that hold spaces, or remove data.tokenizer to have one trained"
            )


def build_tokenizer(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Return a tokenizer that gives the ids of the sentencepiece model.

    Sentencepiece merges the adjacent pair whose joined piece scores best; tokenizers merges pairs by rank. So each way
    to split a piece into two pieces becomes a merge, ranked by the score of the joined piece.
    """
    ids = {piece.text: number for number, piece in enumerate(vocabulary.pieces)}
    if len(ids) < len(vocabulary):
        raise InputError(f"the tokenizer has {len(vocabulary) - len(ids)} pieces twice: train it again")
    tokenizer = tokenizers.Tokenizer(
        BPE(
            vocab=ids,
            merges=_merges(vocabulary),
            unk_token=vocabulary.pieces[vocabulary.unknown_id].text,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # No pre-tokenizer: sentencepiece merges across spaces and newlines.
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(_added_tokens(vocabulary, PieceType.UNKNOWN, PieceType.CONTROL, special=True))
    tokenizer.add_tokens(_added_tokens(vocabulary, PieceType.USER_DEFINED, special=False))
    return tokenizer


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    # Byte, control and unknown pieces are never matched against text, so no merge contains one.
    parts = {
        piece.text
        for piece in vocabulary.pieces
        if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
    }
    merged = [piece for piece in vocabulary.pieces if piece.type is PieceType.NORMAL and len(piece.text) > 1]
    # The sort is stable: pieces of equal score stay in the order of their ids, as in sentencepiece.
    merged.sort(key=lambda piece: -piece.score)
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in merged
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in parts and piece.text[cut:] in parts
    ]


def _added_tokens(vocabulary: Vocabulary, *types: PieceType, special: bool) -> list[AddedToken]:
    return [
        AddedToken(piece.text, normalized=False, special=special) for piece in vocabulary.pieces if piece.type in types
    ]
