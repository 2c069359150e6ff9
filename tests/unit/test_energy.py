"""Energy of GPUs: the driver's counters, read through a stand-in of its library, and what becomes of their joules."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from configs.figures import energy
from tests.support.steps import step_result
from training.energy import ReadAhead, counter_of, counters_of_node, open_nvml, spent_joules
from training.metrics_file import MetricsFile


class Driver:
    """NVML with two GPUs; `millijoules` are their counters, None where one has no counter."""

    def __init__(self) -> None:
        self.millijoules: list[int | None] = [5_000, 90_000]

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count.contents.value = len(self.millijoules)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle.contents.value = 100 + index
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        if uuid not in (b"GPU-a", b"GPU-b"):
            return 6  # not found
        handle.contents.value = 100 + (uuid == b"GPU-b")
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        counter = self.millijoules[handle.value - 100]
        if counter is None:
            return 3  # not supported
        value.contents.value = counter
        return 0


def test_a_counter_gives_the_joules_since_the_last_time() -> None:
    driver = Driver()
    counter = counter_of("b", nvml=driver)
    assert counter is not None
    driver.millijoules[1] = 97_500
    assert [counter.take(), counter.take()] == [7.5, 0.0]
    driver.millijoules[0] = None
    first, second = counters_of_node(driver)
    driver.millijoules[1] = 98_000
    assert [first.take(), second.take(), counter.take()] == [None, 0.5, 0.5]


def test_a_step_takes_what_a_thread_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.energy.READ_SECONDS", 0.01)
    driver = Driver()
    counter = counter_of("a", nvml=driver)
    assert counter is not None
    ahead = ReadAhead(counter)
    taken = [ahead.take()]
    driver.millijoules[0] = 9_000
    until = time.monotonic() + 10
    while sum(filter(None, taken)) < 4.0 and time.monotonic() < until:
        taken.append(ahead.take())
    assert {*taken} == {0.0, 4.0}
    driver.millijoules[0] = None
    while ahead.take() is not None and time.monotonic() < until:
        pass
    assert ahead.take() is None


def test_a_machine_without_a_driver_has_no_counters() -> None:
    assert open_nvml("libno-such-driver.so") is None
    assert open_nvml("libc.so.6") is None  # a library that is none of NVML
    assert counter_of("a", nvml=None) is None
    assert counter_of("another", nvml=Driver()) is None
    assert counters_of_node(None) == []


def test_lost_steps_count_too(tmp_path: Path) -> None:
    assert spent_joules(tmp_path) == 0.0
    metrics = MetricsFile(tmp_path, last_step=0)
    for step in (1, 2, 3):
        metrics.on_step(step_result(step=step, energy_joules=100.0 * step if step > 1 else None))
    metrics.close("KILLED")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("energy_joules", "none") for line in lines] == ["none", 200.0, 300.0]
    resumed = MetricsFile(tmp_path, last_step=2)  # step 3 is lost
    resumed.on_step(step_result(step=3, energy_joules=50.0))
    resumed.close("FINISHED")
    assert spent_joules(tmp_path) == 200.0 + 300.0 + 50.0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "energy_joules": 1')
    assert spent_joules(tmp_path) == 550.0


@pytest.mark.parametrize(
    ("joules", "text"),
    [(0.0, "0 J"), (320.4, "320 J"), (3.6e6, "1 kWh"), (44_280.0, "0.0123 kWh"), (4.32e9, "1.2 MWh")],
)
def test_energy_is_written_in_one_unit(joules: float, text: str) -> None:
    assert energy(joules) == text
