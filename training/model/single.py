"""A trained decoder in one process, for evaluation, export and generation: no engine, no other ranks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.precisions import DEFAULT_PRECISION, Precision, require_device, require_precision
from configs.scales import PositionScale, Scaling
from configs.schema import Model
from parallel.axes import Groups
from parallel.documents import split_batch
from parallel.groups import lone_groups
from parallel.parameter import Shard
from parallel.shards import declared
from parallel.start import flush_denormals, start_alone
from training.checkpoint.read import Checkpoint
from training.model.attention import AttentionBlock, windows_of
from training.model.cache import KeyValueCache
from training.model.decoder import Decoder, plan_layers
from training.model.decoding import Capture, CudaGraph, TokenSteps
from training.model.proof.attention_weights import dtype_of
from training.model.proof.certificate import certificates_to_json, certify
from training.model.scaled import ScaledPositions

CPU_BATCH_TOKENS = 2048  # inputs of one pass; more no longer fit into a CPU's caches
GPU_BATCH_TOKENS = 65536  # with as many, matrix products reach a GPU's limit
_PASS_SHARE = 0.5  # of a GPU's free memory
_STATES_KEPT = 16  # hidden states of a token that a block has at one time, at most: 4 of them are the feed-forward's
_LOGIT_ROWS = 1024  # tokens whose logits are in memory at one time


class _Products:
    """How fp32 matrices are multiplied: torch has one setting for all threads."""

    def __init__(self) -> None:
        self._turn, self._ended, self._running, self._before = threading.Lock(), threading.Condition(), 0, ""

    @contextmanager
    def set_to(self, products: str) -> Iterator[None]:
        """Multiply in one way. Calls that multiply alike run together; on a CPU all do."""
        with self._turn, self._ended:  # calls that come later queue behind one that waits, or it might wait forever
            self._ended.wait_for(lambda: not self._running or torch.get_float32_matmul_precision() == products)
            if not self._running:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision(products)
            self._running += 1
        try:
            yield
        finally:
            with self._ended:
                self._running -= 1
                if not self._running:
                    torch.set_float32_matmul_precision(self._before)
                    self._ended.notify()


_PRODUCTS = _Products()


@contextmanager
def inference(precision: Precision) -> Iterator[None]:
    """Compute without gradients in a precision, fast in any thread: another than the loader's flushes no denormals.

    Waits while other threads multiply fp32 matrices in another way, on a GPU.
    """
    flush_denormals()
    with _PRODUCTS.set_to(precision.fp32_products), torch.no_grad():
        yield


class SingleModel:
    """A decoder with whole weights on one device.

    Attributes:
        certificate: The newest certificate of its positions, as plain values.
        batch_tokens: Inputs of one pass that use the device well.
        windows: Lossless windows of its attention; None if it has none.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        device: torch.device,
        certificate: dict[str, Any],
        precision: str = DEFAULT_PRECISION,
        capture: Capture | None = None,
        positions: ScaledPositions | None = None,
    ) -> None:
        """Move the weights.

        Args:
            decoder: The decoder; it is changed.
            device: Where to compute.
            certificate: The certificate of its positions, as plain values.
            precision: Value of `--precision`.
            capture: Makes the decoding of a token faster, see `TokenSteps`; by default a CUDA graph on a GPU.
            positions: Scales its positions; None to leave them as trained.
        """
        self._precision, self._device = require_precision(precision), device
        self._decoder = decoder.to(device, dtype_of(precision)).eval()
        if device.type == "cpu":
            _store_by_columns(decoder)
        elif capture is None:
            capture = CudaGraph
        self._capture, self._positions = capture, positions
        self._steps = self._new_steps()
        self.certificate, self.windows = certificate, windows_of(decoder)

    @property
    def blocks(self) -> list[AttentionBlock]:
        """The blocks, in order."""
        return [layer for layer in self._decoder.layers if isinstance(layer, AttentionBlock)]

    @property
    def batch_tokens(self) -> int:
        """Inputs of one pass that use the device well: on a GPU, those that fit into half of the free memory."""
        if self._device.type == "cpu":
            return CPU_BATCH_TOKENS
        return self._gpu_tokens(states=_STATES_KEPT)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept beside a pass that uses the device well."""
        if self._device.type == "cpu":
            return 4 * CPU_BATCH_TOKENS  # most of them are not computed, only attended to
        return self._gpu_tokens(states=_STATES_KEPT + 2 * len(self.blocks))

    def fit_length(self, length: int) -> None:
        """Scale positions for texts of a length if they follow it; begin no text before that is done.

        Raises:
            TrainshortError: the positions are wrong; see `training.model.proof.certificate`.
        """
        if self._positions is not None and self._positions.fit(length):
            self.certificate = self._positions.certificate
            if self.windows is not None:
                self.windows.take()  # the certificate's calls
            self._steps = self._new_steps()

    def change_weights(self, change: Callable[[Tensor, Shard], Tensor]) -> None:
        """Replace each weight, fp32, by what a function makes of it and its declaration."""
        with torch.no_grad():
            for parameter, shard in declared(self._decoder).values():
                parameter.copy_(change(parameter.float(), shard))
        self._steps = self._new_steps()

    def _new_steps(self) -> TokenSteps | None:
        """Return steps that have captured nothing: those from before another bias hold the bias of before."""
        return None if self._capture is None else TokenSteps(self._decoder, capture=self._capture)

    def losses(self, tokens: Tensor, *, last: int | None = None) -> Tensor:
        """Return the loss of predicted tokens; memory grows linearly with length.

        Positions that follow the length follow this one. On a GPU this only launches the work: reading the result waits
        for it.

        Args:
            tokens: [batch, length + 1] int64, of any length, on the CPU. Or [batch, 2, length + 1], with the tokens and
                whether each begins a document: attention then stays inside documents.
            last: How many of the last predictions: the last block and the head compute no others. None for all.
        Returns:
            Negative log-likelihood in nats of the last tokens, [batch, last] fp32, on the model's device.
        """
        length = tokens.shape[-1] - 1
        scored = length if last is None else last
        self.fit_length(length)
        with inference(self._precision):
            inputs, targets, documents = split_batch(self._pinned(tokens), device=self._device)
            x = self._decoder.hidden(inputs, documents, last=last)  # [scored, batch, hidden]
            return self._decoder.token_losses(x, targets[:, length - scored :].T).T

    def score(self, tokens: Tensor, where: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of some predicted tokens, and whether each is the likeliest one.

        Args:
            tokens: [batch, length + 1] int64, on the CPU.
            where: Which of tokens[:, 1:] to score, [batch, length] bool, on the CPU.
            cache: Keys and values of the tokens before; tokens[:, :-1] are added to it.
        Returns:
            Nats [scored] fp32 and [scored] bool, row by row, on the CPU.
        """
        with inference(self._precision):
            # found on the CPU: a GPU would be waited for, to learn how many they are
            tokens, scored = (self._pinned(x).to(self._device, non_blocking=True) for x in (tokens, where.nonzero()))
            rows, places = scored.unbind(1)
            x = self._decoder.hidden(tokens[:, :-1], cache)  # [length, batch, hidden]
            states, targets = x[places, rows], tokens[rows, places + 1]
            losses = self._decoder.token_losses(states, targets)
            likeliest = torch.cat([self._decoder.logits(part).argmax(-1) for part in torch.split(states, _LOGIT_ROWS)])
            return losses.float().cpu(), (likeliest == targets).cpu()

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the token after the last, [batch, vocab] fp32, on the model's device.

        Args:
            tokens: The tokens that follow those in the cache, [batch, new] int64.
            cache: Keys and values of the tokens before; the new tokens are added to it.
        """
        with inference(self._precision):
            logits = None
            if self._steps is not None and tokens.shape[1] == 1 and cache.length:
                logits = self._steps.next_logits(tokens, cache)
            if logits is None:
                x = self._decoder.hidden(tokens.to(self._device), cache)  # [new, batch, hidden]
                logits = self._decoder.logits(x[-1])
            return logits.to(torch.float32, copy=True)  # the next call may overwrite them

    def logits(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return [batch, seq, vocab] fp32 on the CPU, of tokens [batch, seq].

        With a cache, the tokens follow those in it and are added to it.
        """
        with inference(self._precision):
            x = self._decoder.hidden(tokens.to(self._device), cache)  # [seq, batch, hidden]
            return self._decoder.logits(x).transpose(0, 1).cpu().float()  # in fp32 a GPU may not have room for them

    def _gpu_tokens(self, *, states: int) -> int:
        hidden = self._decoder.get_parameter("embedding.weight").shape[1]
        return gpu_batch_tokens(free_bytes(self._device), hidden=hidden, width=self._precision.width, states=states)

    def _pinned(self, tokens: Tensor) -> Tensor:
        """Return tokens that can be copied to a GPU beside its work: in memory that cannot be paged out."""
        return tokens if self._device.type == "cpu" else tokens.pin_memory()


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, with what torch keeps of earlier passes."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def gpu_batch_tokens(free: int, *, hidden: int, width: int, states: int = _STATES_KEPT) -> int:
    """Return the inputs of one pass on a GPU.

    Args:
        free: Free memory, in bytes.
        hidden: Width of the hidden states.
        width: Bytes of an element.
        states: Hidden states of a token that are in memory at one time.
    """
    return min(GPU_BATCH_TOKENS, int(_PASS_SHARE * free) // (states * hidden * width))


def inference_device(precision: str) -> torch.device:
    """Return the device that evaluates and generates in a precision: a GPU if there is one, which begins to start.

    Raises:
        InputError: the precision is not known, or needs a GPU where there is none.
    """
    device = start_alone()
    require_device(precision, device=device.type)
    if device.type == "cuda":
        # It takes seconds, which reading the checkpoint and the text need too.
        threading.Thread(target=torch.cuda.synchronize, daemon=True).start()
    return device


def inference_model(model: Model) -> Model:
    """Return a trained model's section with the default attention, whatever it trained with.

    `reference` is replaced too: it computes all scores at once, which do not fit in memory at long lengths. Lossless
    windows are on for the same reason.
    """
    return model.model_copy(update={"attention": "auto", "windows": "auto"})


def load_single(
    checkpoint: Checkpoint, *, precision: str = DEFAULT_PRECISION, scale: PositionScale | None = None
) -> SingleModel:
    """Return the model of a checkpoint of any layout; see `inference_model`.

    Args:
        checkpoint: The checkpoint.
        precision: Value of `--precision`, whatever it trained in.
        scale: Scales its positions; None to leave them as trained.
    Raises:
        InputError: the precision is not known, or needs a GPU where there is none.
        TrainshortError: its positions are wrong; see `training.model.proof.certificate`.
    """
    device, groups = inference_device(precision), lone_groups()
    model = inference_model(checkpoint.config.model)
    documents = checkpoint.config.data.mask_documents
    decoder = lone_decoder(model, vocab_size=checkpoint.vocab_size, documents=documents)
    for parameter, shard in declared(decoder).values():
        parameter.data = checkpoint.slice(shard, kind="weight", part=None)
    decoder.to(device, dtype_of(precision))
    measure = partial(
        inference_certificate, decoder, model, groups=groups, precision=precision, device=device, documents=documents
    )
    if scale is None:
        return SingleModel(decoder, device=device, certificate=measure(scaling=None), precision=precision)
    positions = ScaledPositions(
        decoder,
        model,
        tensor=groups.tensor,
        scale=scale,
        train_length=checkpoint.train_length,
        measure=lambda scaling: measure(scaling=scaling),
        documents=documents,
    )
    certificate = positions.certificate
    return SingleModel(decoder, device=device, certificate=certificate, precision=precision, positions=positions)


def inference_certificate(
    module: nn.Module,
    model: Model,
    *,
    groups: Groups,
    precision: str,
    device: torch.device,
    documents: bool,
    scaling: Scaling | None = None,
) -> dict[str, Any]:
    """Measure the positions of a loaded model, and return its certificates as plain values; every rank must call it.

    Args:
        module: This rank's layers.
        model: The decoder's shape.
        groups: This rank's places.
        precision: Value of `--precision`.
        device: Where it runs.
        documents: Whether attention may be asked to stay inside documents.
        scaling: Scales the slopes; None to leave them as trained.
    Raises:
        TrainshortError: its positions are wrong; see `training.model.proof.certificate`.
    """
    with inference(require_precision(precision)):
        certificates = certify(
            module,
            model,
            groups=groups,
            precision=precision,
            device=device,
            documents=documents,
            otherwise="read the checkpoint with another torch or on another machine, and report this",
            scaling=scaling,
        )
    return certificates_to_json(certificates, model, scaling=scaling)


def lone_decoder(model: Model, *, vocab_size: int, documents: bool = False) -> Decoder:
    """Return a decoder in a world of one, its weights not yet set, on the CPU."""
    start_alone()
    tensor = lone_groups().tensor
    return Decoder(plan_layers(model, vocab_size=vocab_size, tensor=tensor, recompute=False, documents=documents))


def _store_by_columns(decoder: Decoder) -> None:
    """Store each block's matrices by columns: a CPU multiplies one row with them a quarter faster, and many as fast."""
    for layer in decoder.layers:
        for part in layer.modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2:
                weight.data = weight.data.t().contiguous().t()
