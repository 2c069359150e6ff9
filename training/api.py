"""The Python interface: load a trained model, then generate text, measure losses, or compute logits.

    from training.api import load

    model = load("runs/demo")
    print(model.generate("Once", tokens=50, temperature=0.8, top_p=0.95, seed=1))

The command line uses it too. It prints nothing, and every call stands alone: a model may be used from several threads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.errors import InputError
from configs.path_text import expand_path
from configs.positions import fixed_scale_for
from configs.precisions import DEFAULT_PRECISION
from data_pipeline.tokenizer import load_tokenizer
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.generation import GeneratedText, TextStream
from training.model.single import inference_device, load_single
from training.sampling import choose_sampling, require_utf8

TokenIds = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any] | Tensor
"""Token ids, [length] or [batch, length], of any integer type."""


class TrainedModel:
    """A trained model in this process: whole weights, on a GPU if there is one.

    Attributes:
        path: The checkpoint's folder.
        step: Optimizer steps that it was trained for.
        config: The run that trained it.
        train_length: Tokens of a training sequence. No call is limited to it.
        vocab_size: Tokens that it knows; their ids are 0 to vocab_size - 1.
        precision: What it computes in: fp32, tf32, bf16 or fp16.
        scale: What its positions are scaled by, as in linear:4; None for positions as trained.
        certificate: What was measured of its positions when it was loaded, as plain values.
    """

    def __init__(self, checkpoint: Checkpoint, *, precision: str, scale: str | None = None) -> None:
        """Load the weights; see `load`."""
        chosen = None if scale is None else fixed_scale_for(str(scale), checkpoint.config.model)
        self._tokenizer = load_tokenizer(checkpoint.tokenizer)
        self._model = load_single(checkpoint, precision=precision, scale=chosen)
        self.precision, self.scale = precision, None if chosen is None else str(chosen)
        self.path, self.step, self.config = checkpoint.path.absolute(), checkpoint.step, checkpoint.config
        self.train_length = checkpoint.train_length
        self.vocab_size = checkpoint.vocab_size
        self.certificate = self._model.certificate

    def __repr__(self) -> str:
        return f"<TrainedModel {self.path}, step {self.step}>"

    def generate(
        self,
        prompt: str = "",
        *,
        tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> GeneratedText:
        """Return a prompt and its continuation.

        Args:
            prompt: Text to continue; empty for the start of a document.
            tokens: New tokens at most; generation stops at the end of the document.
            temperature: Divides the logits, 0.8 unless given; 0 takes the likeliest token and draws nothing.
            top_p: Draw from the likeliest tokens whose probabilities add up to this, 0.95 unless given.
            seed: Seed of the draws; a random one unless given, which is the result's `seed`.
        Returns:
            The text with its tokens and times; `str()` of it is the text.
        Raises:
            InputError: the prompt is not text in UTF-8, or a value is not a number or out of range.
            TrainshortError: the model's logits are not finite.
        """
        stream = self.stream(prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: str = "",
        *,
        tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> TextStream:
        """Return an iterator over the pieces of a text while it is generated; arguments and errors as `generate`.

        The first piece is the prompt. Joined, the pieces are the text that `generate` returns; the iterator's `result`
        holds what has been generated so far.
        """
        return TextStream(
            self._model,
            self._tokenizer,
            prompt=prompt,
            tokens=tokens,
            sampling=choose_sampling(temperature=temperature, top_p=top_p, seed=seed),
            train_length=self.train_length,
        )

    def losses(self, tokens: TokenIds) -> Tensor:
        """Return the loss of each predicted token; memory grows linearly with the length.

        Args:
            tokens: [length] or [batch, length], at least 2 long; tokens[..., 1:] are predicted.
        Returns:
            Negative log-likelihood in nats, [length - 1] or [batch, length - 1] fp32, on the CPU.
        Raises:
            InputError: these are not token ids of the model, or too few.
        """
        ids = self._checked(tokens, shortest=2)
        losses = self._model.losses(ids if ids.ndim == 2 else ids[None]).cpu()
        return losses if ids.ndim == 2 else losses[0]

    def logits(self, tokens: TokenIds) -> Tensor:
        """Return the logits of the token after each token.

        Args:
            tokens: [length] or [batch, length], at least 1 long.
        Returns:
            [length, vocab_size] or [batch, length, vocab_size] fp32, on the CPU.
        Raises:
            InputError: these are not token ids of the model, or too few.
        """
        ids = self._checked(tokens, shortest=1)
        logits = self._model.logits(ids if ids.ndim == 2 else ids[None])
        return logits if ids.ndim == 2 else logits[0]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added.

        Raises:
            InputError: it is not text, or not UTF-8.
        """
        return self._tokenizer.encode(require_utf8(text, name="what is encoded"))

    def decode(self, tokens: Sequence[int] | npt.NDArray[Any] | Tensor) -> str:
        """Return the text of token ids, [length]; control tokens have none.

        Raises:
            InputError: these are not token ids of the model, or more than one sequence.
        """
        ids = self._checked(tokens, shortest=0)
        if ids.ndim != 1:
            raise InputError(f"tokens to decode must have the shape [length], got {list(ids.shape)}: give one sequence")
        return self._tokenizer.decode(ids.tolist())

    def _checked(self, tokens: TokenIds, *, shortest: int) -> Tensor:
        """Return token ids as int64 with their shape; refuse anything else."""
        ids = _as_integers(tokens)
        if ids.ndim not in (1, 2) or 0 in ids.shape[:-1] or ids.shape[-1] < shortest:
            raise InputError(
                f"tokens must have the shape [length] or [batch, length] with a length of at least {shortest}, got "
                f"{list(ids.shape)}"
            )
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise InputError(
                f"token ids must be from 0 to {self.vocab_size - 1}, got {outside[0]}: use the ids that encode() gives"
            )
        return torch.from_numpy(ids.astype(np.int64))


def load(path: str | Path, *, precision: str = DEFAULT_PRECISION, scale: str | None = None) -> TrainedModel:
    """Load a trained model.

    Args:
        path: A run folder for its newest checkpoint, or a checkpoint's folder. Its layout does not matter.
        precision: What to compute in, whatever it trained in: fp32; tf32, on a GPU; bf16; or fp16.
        scale: Scales ALiBi or rotary positions for texts longer than in training, by a factor: linear:4,
            ntk:4, or for rotary positions yarn:4.
    Raises:
        InputError: there is no whole checkpoint, or the precision is not known or needs a GPU where there is none, or
            the scale is not known, has no factor or does not fit the positions.
        TrainshortError: the model's positions are wrong; see `training.model.proof.certificate`.
    """
    inference_device(precision)  # before the checkpoint is read
    return TrainedModel(open_checkpoint(expand_path(str(path))), precision=precision, scale=scale)


def _as_integers(tokens: object) -> npt.NDArray[Any]:
    if isinstance(tokens, str):
        raise InputError("tokens must be token ids, got text: encode() gives them")
    if isinstance(tokens, Tensor) and tokens.is_floating_point():  # also types that numpy lacks
        raise InputError(f"tokens must be integers, got {tokens.dtype}: use the ids that encode() gives")
    try:
        ids = np.asarray(tokens.detach().cpu() if isinstance(tokens, Tensor) else tokens)
    except ValueError:  # numpy's message tells of its arrays
        raise InputError("tokens must be rows of one length: pad them, or give one row at a time") from None
    if not np.issubdtype(ids.dtype, np.integer) and ids.size:  # an empty list has no type
        raise InputError(f"tokens must be integers, got {ids.dtype}: use the ids that encode() gives")
    return ids
