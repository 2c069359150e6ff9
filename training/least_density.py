"""The least share of the scores that a model's attention computes, and its line at the start. Imports no torch."""

import math
from statistics import fmean

from configs.backends import Backend, backend_of
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.schema import Model, RunConfig


def attention_here(config: RunConfig, *, device: str) -> str:
    """Return how a run's ranks compute attention on a kind of device, as far as is known without asking a GPU."""
    model, precision = config.model, config.train.precision
    documents = config.data.mask_documents
    backend = backend_of(
        model.attention,
        device=device,
        position=model.position,
        precision=precision,
        head_dim=model.head_dim,
        documents=documents,
    )
    device = device if device in backend.devices else backend.devices[-1]  # it will run elsewhere
    length = config.data.sequence_length
    return attention_words(model, backend, device=device, precision=precision, length=length, documents=documents)


def attention_words(
    model: Model, backend: Backend, *, device: str, precision: str, length: int, documents: bool = False
) -> str:
    """Return how attention is computed: the backend, its windows, and the least share of the scores that they leave.

    Args:
        model: The decoder's shape.
        backend: What `model.attention` means here.
        device: Kind of device of the ranks: cpu or cuda.
        precision: Value of `train.precision`.
        length: Tokens of a training sequence.
        documents: Whether attention stays inside documents: how much that leaves out is not known before they are read.
    """
    words = [backend.name]
    if model.window is not None:
        words.append(f"window {model.window:,}")
    slopes = POSITIONS[model.position].slopes
    if slopes is not None and model.windows == "off":
        words.append("windows off")
    lossless = leaves_out(model, backend, device=device, length=length)
    if lossless:
        words.append("lossless windows")
    if documents:
        words.append("documents masked")
    share = least_density(model, backend, device=device, precision=precision, length=length)
    in_one_block = share == 1 and model.window_hides(length)  # which is longer than the window
    if share is not None and not documents and not in_one_block:
        whole, percent = share == 1, math.floor(100 * share)  # rounded down: no metric of the run is below it
        # where a backend looks at scores, near ones that are large can leave out more than slopes alone do
        looks = lossless and (device == "cpu" or (model.windows == "scores" and PRECISIONS[precision].width == 2))
        least = "about" if looks else "at least"
        words[-1] += f": all scores at length {length:,}" if whole else f": {least} {percent / 100:.2f} of the scores"
    return ", ".join(words)


def leaves_out(model: Model, backend: Backend, *, device: str, length: int) -> bool:
    """Return whether this backend leaves keys out by lossless windows; arguments as in `attention_words`."""
    if POSITIONS[model.position].slopes is None or model.windows == "off" or device not in backend.leaves_out_on:
        return False
    return backend.within_window or not model.window_hides(length)


def least_density(model: Model, backend: Backend, *, device: str, precision: str, length: int) -> float | None:
    """Return the share of causal attention's scores that queries and keys of zeros need; None if all are computed.

    With zeros the slope alone decides: `training.model.windows.reach` is then at least the logarithm of the limit over
    the slope. Longer queries and keys have a longer reach. Counted is what a kernel computes, whole blocks: a key that
    one of a block's queries needs is computed for all of them. Arguments as in `attention_words`.
    """
    slopes, window = POSITIONS[model.position].slopes, min(model.window or length, length)
    lossless = leaves_out(model, backend, device=device, length=length)
    if backend.keeps_scores or not (lossless or model.window):
        return None
    reaches, nearest = [window], 0
    if slopes is not None and lossless and length >= backend.shortest:
        limit = PRECISIONS[precision].epsilon / 8  # as training.model.windows.share_limit
        reaches = [min(window, math.ceil(-math.log(limit) / slope)) for slope in slopes(model)]
        nearest = backend.nearest
    rows = backend.query_block or backend.tile
    return fmean(_share_within(reach, length, rows=rows, nearest=nearest) for reach in reaches)


def _share_within(reach: int, length: int, *, rows: int, nearest: int) -> float:
    """Return the share of the causal scores of a sequence's blocks that are computed.

    Args:
        reach: Tokens that each query needs, itself included.
        length: Tokens of the sequence.
        rows: Queries of a block.
        nearest: Keys up to a block's last query that are computed in any case.
    """
    blocks, rest = divmod(length, rows)
    most = max(nearest, reach + rows - 1)  # keys that a whole block takes
    early = min(blocks, most // rows)  # blocks that have no more
    computed = rows * rows * early * (early + 1) // 2 + (blocks - early) * rows * most
    computed += rest * min(length, max(nearest, reach + rest - 1))
    return computed / (rows * rows * blocks * (blocks + 1) // 2 + rest * length)
