"""Write a sentencepiece BPE model as the tokenizer.json of Hugging Face's tokenizers, with the same ids."""

import json
import shutil
from pathlib import Path

from configs.errors import InputError
from data_pipeline.portable import build_tokenizer
from data_pipeline.vocabulary import Vocabulary, read_vocabulary

# Transformers' value for "no limit". With ALiBi there is none, and any smaller number makes transformers warn about
# long texts.
_NO_LIMIT = int(1e30)


def require_rows(vocabulary: Vocabulary, *, tokenizer: Path, rows: int) -> None:
    """Refuse a tokenizer with more pieces than a model's embedding has rows.

    Raises:
        InputError: names both numbers.
    """
    if len(vocabulary) > rows:
        raise InputError(
            f"tokenizer {tokenizer} has {len(vocabulary)} pieces, the model's embedding {rows} rows: "
            "give the tokenizer that the model was trained with"
        )


def write_tokenizer(model: Path, out: Path) -> Vocabulary:
    """Write tokenizer.json, tokenizer_config.json and tokenizer.model; return the pieces.

    Args:
        model: A sentencepiece .model file.
        out: The folder.
    Raises:
        InputError: the tokenizers library would give other ids for this model.
    """
    vocabulary = read_vocabulary(model)
    # not its save: on a full disk that raises a bare Exception
    (out / "tokenizer.json").write_text(build_tokenizer(vocabulary).to_str(pretty=True), encoding="utf-8")
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
        # transformers 4 would add token_type_ids, which Bloom's generate() refuses
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(model, out / "tokenizer.model")
    return vocabulary
