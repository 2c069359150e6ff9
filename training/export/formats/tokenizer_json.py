"""Write a sentencepiece BPE model as the tokenizer.json of Hugging Face's tokenizers, with the same ids."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from configs.errors import InputError
from data_pipeline.vocabulary import PieceType, Vocabulary, read_vocabulary

# sentencepiece's mark for a space inside a piece
_SPACE = "\u2581"
# Transformers' value for "no limit". With ALiBi there is none, and any smaller number makes transformers warn about
# long texts.
_NO_LIMIT = int(1e30)


def write_tokenizer(model: Path, out: Path) -> Vocabulary:
    """Write tokenizer.json, tokenizer_config.json and tokenizer.model; return the pieces.

    Args:
        model: A sentencepiece .model file.
        out: The folder.
    Raises:
        InputError: the tokenizers library would give other ids for this model.
    """
    vocabulary = read_vocabulary(model)
    build_tokenizer(vocabulary).save(str(out / "tokenizer.json"))
    roles = {
        "unk_token": vocabulary.unknown_id,
        "bos_token": vocabulary.begin_id,
        "eos_token": vocabulary.end_id,
    }
    config = {
        # transformers 5 writes TokenizersBackend here, which transformers 4 cannot load.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: vocabulary.pieces[number].text for role, number in roles.items() if number is not None},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(model, out / "tokenizer.model")
    return vocabulary


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Return a tokenizer that gives the ids of the sentencepiece model.

    Sentencepiece merges the adjacent pair whose joined piece scores best; tokenizers merges pairs by rank. So each way
    to split a piece into two pieces becomes a merge, ranked by the score of the joined piece.
    """
    ids = {piece.text: number for number, piece in enumerate(vocabulary.pieces)}
    if len(ids) < len(vocabulary):
        raise InputError(f"the tokenizer has {len(vocabulary) - len(ids)} pieces twice: train it again")
    tokenizer = Tokenizer(
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
