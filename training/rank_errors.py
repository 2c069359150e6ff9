"""Say in words why a rank of a run failed: out of memory, or without the other ranks. Imports no torch.

Everything that is needed to say it is imported before memory is short.
"""

import logging
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.errors import LostPeers, TrainshortError, first_line, in_brief
from configs.schema import RunConfig
from parallel.layout import Layout
from parallel.start import ProcessRank
from training.memory_changes import change_lines, memory_changes
from training.out_of_memory import DETAIL, OutOfMemory, how_it_ran_out, is_of_gpu, memory_error, with_remedies

logger = logging.getLogger(__name__)

# What gloo, NCCL and the store in which the ranks met say once another rank has ended.
_LOST_PEERS = re.compile(
    r"gloo/transport|connection (?:was likely )?(?:closed|reset)|broken pipe|failed to recv|ncclRemoteError|"
    r"remote process|communicator was aborted",
    re.IGNORECASE,
)
# What torch says if the ranks do not meet.
_NOT_MET = re.compile(r"(?:client|server) socket has|waiting for clients")
# Kinds of NCCL's errors that come from the machine; after an error of a kernel, NCCL's calls of CUDA fail too.
_NCCL_FAILED = re.compile(r"nccl(?:System|Internal|UnhandledCuda)Error")
_KERNEL_FAILED = re.compile(r"illegal (?:memory access|address|instruction)|device-side assert|misaligned address")


ExplainRank = Callable[[int, str, bool], str]
"""Function from a rank, what happened to it and whether on a GPU to the message about a rank out of memory."""


@contextmanager
def explain_rank_failure(config: RunConfig, process: ProcessRank) -> Iterator[None]:
    """Report a rank of a run that ran out of memory or lost the others: see `explain_failure_of`."""

    def explain(rank: int, how: str, on_gpu: bool) -> str:
        layout = Layout.of(config, world_size=process.world_size)
        return rank_out_of_memory(config, layout, rank, how, on_gpu=on_gpu)

    with explain_failure_of(process, explain=explain):
        yield


@contextmanager
def explain_failure_of(process: ProcessRank, *, explain: ExplainRank) -> Iterator[None]:
    """Report a rank that ran out of memory or lost the others as such; a local rank's log gets the traceback.

    Args:
        process: This process among the ranks.
        explain: Makes the message about a rank out of memory.
    Raises:
        OutOfMemory: names the rank, what it held, and what to change.
        LostPeers: points to the rank that failed first.
        TrainshortError: the ranks cannot meet, or NCCL cannot work on this machine or its network, and why. Its exit
            code lets a batch script look whether a node is lost.
    """
    try:
        yield
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        words: TrainshortError
        if (cause := memory_error(error)) is not None:
            words = OutOfMemory(explain(process.rank, how_it_ran_out(cause), is_of_gpu(cause)))
        elif isinstance(error, RuntimeError) and _LOST_PEERS.search(str(error)):
            words = LostPeers(
                f"rank {process.rank} lost its connection to the other ranks: the cause is in the log of the rank that "
                "failed first"
            )
        elif isinstance(error, RuntimeError) and (why := _network_failure(str(error))) is not None:
            words = TrainshortError(
                f"rank {process.rank} cannot exchange data with the others ({why}): repair what this names; with "
                "NCCL_DEBUG=INFO, NCCL says more"
            )
        else:
            raise
        if process.starter == "local":  # its output is its log
            traceback.print_exception(error)
        else:
            logger.debug("rank %d failed", process.rank, exc_info=error)
        raise words from None


def _network_failure(text: str) -> str | None:
    """Return what torch says of ranks that do not meet, or NCCL of a machine on which it cannot work.

    None for any other error, which may be ours.
    """
    if _NOT_MET.search(text):
        return first_line(RuntimeError(text)).rstrip(".")
    kind = _NCCL_FAILED.search(text)
    if kind is None or _KERNEL_FAILED.search(text):
        return None
    last = text.partition("Last error:")[2].strip()
    return in_brief(f"{kind[0]}: {last}" if last else kind[0])


def rank_out_of_memory(config: RunConfig, layout: Layout, rank: int, how: str, *, on_gpu: bool) -> str:
    """Return the message about a rank that ran out of memory.

    Args:
        config: The run.
        layout: How its ranks are split into axes.
        rank: The rank.
        how: What happened to it, `ran out of memory`, then details, each after DETAIL.
        on_gpu: Whether it was a GPU's memory.
    """
    remedies = change_lines(memory_changes(config, layout=layout, on_gpu=on_gpu))
    return with_remedies(_where(layout, rank, how), remedies, on_gpu=on_gpu)


def evaluation_out_of_memory(layout: Layout, rank: int, how: str, *, on_gpu: bool) -> str:
    """Return the message about a rank of an evaluation that ran out of memory; arguments as `rank_out_of_memory`."""
    remedies = ("shorter --lengths", "a larger --tensor or --pipeline")
    return with_remedies(_where(layout, rank, how), remedies, on_gpu=on_gpu)


def _where(layout: Layout, rank: int, how: str) -> list[str]:
    first, *more = how.split(DETAIL)
    return [f"rank {rank} {first}", f"place: {layout.place_of(rank)}, on {socket.gethostname()}", *more]
