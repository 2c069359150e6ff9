"""Waiting for other ranks in each kind of store that ranks can meet in; a rank is a thread here."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from parallel.axes import Group
from parallel.collectives import wait_for_all

RANKS, ROUNDS = 3, 3
SHORT = timedelta(milliseconds=500)
LONG = timedelta(seconds=60)


def file_stores(folder: Path) -> list[Any]:
    return [dist.FileStore(str(folder / "meet"), RANKS) for _ in range(RANKS)]  # type: ignore[attr-defined]


def tcp_stores() -> list[Any]:
    first = dist.TCPStore("127.0.0.1", 0, RANKS, True, LONG, wait_for_workers=False)
    others = [dist.TCPStore("127.0.0.1", first.port, RANKS, False, LONG) for _ in range(RANKS - 1)]
    for store in (first, *others):
        store.set_timeout(SHORT)
    return [first, *others]


def test_ranks_wait_for_the_last_one_in_every_round(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as kinds:  # at the same time: they sleep
        list(kinds.map(check_waiting, (file_stores(tmp_path), tcp_stores())))


def check_waiting(stores_of_ranks: list[Any]) -> None:
    stores = [dist.PrefixStore("group/", store) for store in stores_of_ranks]

    def arrive(rank: int) -> list[tuple[float, float]]:
        group = Group(rank, RANKS, SimpleNamespace(get_group_store=lambda: stores[rank], group_desc="data"))
        times = []
        for number in range(ROUNDS):
            if number % RANKS == rank:
                time.sleep(2 * SHORT.total_seconds())  # longer than the store would wait
            times.append((time.monotonic(), _time_after(group)))
        return times

    with ThreadPoolExecutor(RANKS) as threads:
        ranks = list(threads.map(arrive, range(RANKS)))
    for arrivals in zip(*ranks, strict=True):
        assert max(came for came, _ in arrivals) <= min(left for _, left in arrivals)
    assert {store.get("arrived at data") for store in stores} == {str(RANKS * ROUNDS).encode()}


def _time_after(group: Group) -> float:
    wait_for_all(group)
    return time.monotonic()


def test_one_rank_waits_for_nobody() -> None:
    wait_for_all(Group(0, 1, None))
