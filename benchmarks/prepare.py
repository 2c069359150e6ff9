"""Time `prepare` against HF tokenizers' BPE on the same text, sample and vocabulary. Prints one JSON line.

    python -m benchmarks.prepare [SOURCE ...]     # as in data.sources; python-docs unless given

`trainshort` is the whole of `prepare` (read, train, encode, count, write); `train` and `encode` are its two largest
parts alone, from and into memory. `tokenizers` trains and encodes from and into memory, with all cores and nothing
written: `metaspace` with bytes for rare characters is what `prepare` trains, `byte_level` is GPT-2's.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer as OtherTokenizer
from tokenizers import models, pre_tokenizers, trainers

from benchmarks.machine import print_result
from configs.schema import Data
from data_pipeline.prepare import prepare_data
from data_pipeline.sentencepiece_tokenizer import SAMPLE_CHARACTERS, train_tokenizer
from data_pipeline.sources import source_chunks

VOCABULARIES = (8192, 32768)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def main() -> None:
    """Measure each vocabulary."""
    sources = sys.argv[1:] or ["python-docs"]
    data = Data.model_validate({"sources": sources, "vocab_size": VOCABULARIES[0], "sequence_length": 1024})
    texts = [chunk.text for source in data.sources for chunk in source_chunks(source, separator=None)]
    rows = [_row(texts, data.model_copy(update={"vocab_size": vocab_size})) for vocab_size in VOCABULARIES]
    print_result("prepare", characters=sum(map(len, texts)), vocabularies=rows)


def _row(texts: list[str], data: Data) -> dict[str, object]:
    sample, characters = [], 0
    for text in texts:
        sample.append(text)
        characters += len(text)
        if characters >= SAMPLE_CHARACTERS:
            break
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tokenizer.model"
        ours = {
            "seconds": _seconds(lambda: prepare_data(data, folder=Path(folder) / "data", progress=False)),
            "train_seconds": _seconds(lambda: train_tokenizer(sample, vocab_size=data.vocab_size, out=model)),
        }
        tokenizer = train_tokenizer(sample, vocab_size=data.vocab_size, out=model)
        ours["encode_seconds"] = _seconds(lambda: tokenizer.encode_each(texts))
    others = {name: _other(name, sample, texts, vocab_size=data.vocab_size) for name in ("metaspace", "byte_level")}
    fastest = min(other["seconds"] for other in others.values())
    return {
        "vocab_size": data.vocab_size,
        "trainshort": ours,
        "tokenizers": others,
        "speedup": fastest / ours["seconds"],
        "encode_speedup": min(other["encode_seconds"] for other in others.values()) / ours["encode_seconds"],
    }


def _other(name: str, sample: list[str], texts: list[str], *, vocab_size: int) -> dict[str, float]:
    special = ["<unk>", "<s>", "</s>"]
    if name == "metaspace":
        tokenizer = OtherTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special + BYTES, show_progress=False)
    else:
        tokenizer = OtherTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        )
    train = _seconds(lambda: tokenizer.train_from_iterator(sample, trainer))
    encode = _seconds(lambda: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)])
    return {"seconds": train + encode, "train_seconds": train, "encode_seconds": encode}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
