"""Generate a text up to a stop string."""

from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from configs.errors import InputError
from data_pipeline.tokenizer import Tokenizer
from training.generation import LanguageModel, continue_tokens
from training.sampling import Sampling

# Settings of a task that change how tokens are drawn. Others change a text only if something is drawn.
_KNOWN = ("do_sample", "temperature", "top_p")


def continue_until(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    sampling: Sampling,
    tokens: int,
    stop: Sequence[str],
) -> str:
    """Return the text that follows a prompt, up to the first stop string or the end of the document.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompt, at least one.
        sampling: How tokens are sampled.
        tokens: New tokens at most.
        stop: Strings that end the text; they are not part of it.
    """
    words, end = [word for word in stop if word], tokenizer.end_of_document
    new = islice(continue_tokens(model, ids, sampling=sampling, end=end), tokens)
    text = ""
    for piece in tokenizer.decode_each(takewhile(lambda token: token != end, new)):
        text += piece
        if any(word in text for word in words):
            break
    for word in words:
        text = text.partition(word)[0]
    return text


def task_sampling(settings: Mapping[str, Any], *, seed: int) -> Sampling:
    """Return how a task wants tokens to be sampled.

    Args:
        settings: Its `generation_kwargs`, without stop strings and the number of tokens.
        seed: Seed of the draws.
    Raises:
        InputError: it draws in a way that is not supported, or a value is out of range.
    """
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0) or not temperature:
        return Sampling()
    others = [name for name, value in settings.items() if name not in _KNOWN and value is not None]
    if others:
        raise InputError(
            f"a task draws with {', '.join(others)}, and only {', '.join(_KNOWN)} are supported: change its "
            "generation_kwargs"
        )
    return Sampling(temperature, float(settings.get("top_p") or 1.0), seed)
