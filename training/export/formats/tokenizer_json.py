"""A sentencepiece BPE model written as the tokenizer.json of Hugging Face's tokenizers, ids unchanged."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from configs.errors import InputError
from data_pipeline.vocabulary import PieceType, Vocabulary, read_vocabulary

_SPACE = "\u2581"
# what transformers takes for "no limit": ALiBi has none, and any other number makes it warn of long texts
NO_LIMIT = int(1e30)


def write_tokenizer(model: Path, out: Path) -> Vocabulary:
    """Write tokenizer.json, tokenizer_config.json and tokenizer.model; return the pieces.

    Args:
        model: A sentencepiece .model file.
        out: The folder.
    Raises:
        InputError: the model would give other ids there.
    """
    pieces = read_vocabulary(model)
    build_tokenizer(pieces).save(str(out / "tokenizer.json"))
    roles = {"unk_token": pieces.unknown_id, "bos_token": pieces.begin_id, "eos_token": pieces.end_id}
    config = {
        # transformers 5 writes TokenizersBackend here, which transformers 4 does not know
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: pieces.pieces[number].text for role, number in roles.items() if number is not None},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(model, out / "tokenizer.model")
    return pieces


def build_tokenizer(pieces: Vocabulary) -> Tokenizer:
    """Return a tokenizer whose ids are those of the sentencepiece model.

    Sentencepiece merges the neighbours whose joined piece scores best. Tokenizers merges pairs by rank. So each way
    to split a piece into two pieces becomes a merge, ranked by the score of the piece it makes.
    """
    vocabulary = {piece.text: number for number, piece in enumerate(pieces.pieces)}
    if len(vocabulary) < len(pieces):
        raise InputError(f"the tokenizer has {len(pieces) - len(vocabulary)} pieces twice: train it anew")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=pieces.pieces[pieces.unknown_id].text,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # no pre-tokenizer: sentencepiece's merges cross spaces and lines
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(_added(pieces, PieceType.UNKNOWN, PieceType.CONTROL, special=True))
    tokenizer.add_tokens(_added(pieces, PieceType.USER_DEFINED, special=False))
    return tokenizer


def _merges(pieces: Vocabulary) -> list[tuple[str, str]]:
    # bytes, control and unknown pieces never stand in text, so they are no halves
    halves = {
        piece.text
        for piece in pieces.pieces
        if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
    }
    made = [piece for piece in pieces.pieces if piece.type is PieceType.NORMAL and len(piece.text) > 1]
    # sorting is stable: equal scores keep the order of ids, as sentencepiece does
    made.sort(key=lambda piece: -piece.score)
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in made
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in halves and piece.text[cut:] in halves
    ]


def _added(pieces: Vocabulary, *types: PieceType, special: bool) -> list[AddedToken]:
    return [AddedToken(piece.text, normalized=False, special=special) for piece in pieces.pieces if piece.type in types]
