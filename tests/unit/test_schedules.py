"""The learning rate's schedules: their rates, their rules, and what may change in a run that has started."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from transformers.optimization import get_wsd_schedule

from configs.errors import InputError
from configs.load import check_run, dump_run, load_run
from configs.schedules import SCHEDULES
from configs.schema import RunConfig, Train
from tests.support.compared_runs import save
from tests.support.small_run import small_run
from training.folder import with_fixed_keys
from training.preflight import finished_line, require_learning
from training.schedule import first_changed_step, learning_rate, zero_from

PEAK, LEAST, WARMUP, END, COOLDOWN = 1.0, 0.1, 10, 110, 30
KEYS = {"learning_rate": PEAK, "min_learning_rate": LEAST, "warmup_steps": WARMUP, "steps": 150}


def train_of(**keys: Any) -> Train:
    return Train(micro_batch=1, global_batch=1, **{**KEYS, **keys})


def rates_of(schedule: Any, optimizer: torch.optim.Optimizer, *, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def after_warmup(optimizer: torch.optim.Optimizer, fall: LRScheduler) -> SequentialLR:
    warmup = LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)
    return SequentialLR(optimizer, [warmup, fall], milestones=[WARMUP - 1])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_rates_are_those_of_torch(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    fall = {
        "cosine": lambda: CosineAnnealingLR(optimizer, END - WARMUP, eta_min=LEAST),
        "linear": lambda: LinearLR(optimizer, 1.0, LEAST / PEAK, total_iters=END - WARMUP),
        "constant": lambda: ConstantLR(optimizer, 1.0, total_iters=1),
    }[name]()
    expected = rates_of(after_warmup(optimizer, fall), optimizer, steps=END)
    train = train_of(schedule=name, decay_steps=END, min_learning_rate=LEAST)
    assert [learning_rate(step, train=train) for step in range(1, END + 1)] == pytest.approx(expected, rel=1e-6)
    stays = PEAK if name == "constant" else LEAST
    assert learning_rate(END + 1, train=train) == learning_rate(10**9, train=train) == stays


@pytest.mark.parametrize("least", [0.0, LEAST])
def test_rates_of_wsd_are_those_of_transformers(least: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    theirs = get_wsd_schedule(
        optimizer, WARMUP, COOLDOWN, num_training_steps=END, decay_type="linear", min_lr_ratio=least / PEAK
    )
    expected = rates_of(theirs, optimizer, steps=150)  # theirs[n] is of our step n; their warm-up begins at the least
    train = train_of(schedule="wsd", decay_steps=END, cooldown_steps=COOLDOWN, min_learning_rate=least)
    first = WARMUP if least else 1
    assert [learning_rate(step, train=train) for step in range(first, 150)] == pytest.approx(expected[first:], rel=1e-6)
    full = [step for step in range(1, 150) if learning_rate(step, train=train) == PEAK]
    assert full == list(range(WARMUP, END - COOLDOWN + 1))
    assert learning_rate(END - 1, train=train) > learning_rate(END, train=train) == least
    # a fifth of the steps, at least one
    unset, short = (train_of(schedule="wsd", decay_steps=steps, warmup_steps=1) for steps in (100, 4))
    assert [learning_rate(step, train=unset) == PEAK for step in (79, 80, 81)] == [True, True, False]
    assert [learning_rate(step, train=short) for step in (3, 4)] == [PEAK, LEAST]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_changed_step_is_that_of_a_search(name: str) -> None:
    cooldowns = (None, 1, 5, 20) if SCHEDULES[name].cools_down else (None,)
    trains = [
        train_of(schedule=name, warmup_steps=3, min_learning_rate=0.0, decay_steps=end, cooldown_steps=cooldown)
        for end in (24, 25, 40)
        for cooldown in cooldowns
    ]
    for before, now in itertools.product(trains, repeat=2):
        rates = ([learning_rate(step, train=train) for step in range(1, 60)] for train in (before, now))
        differing = (step for step, (then, rate) in enumerate(zip(*rates, strict=True), start=1) if then != rate)
        assert first_changed_step(before, now) == next(differing, None)


def small(**keys: Any) -> RunConfig:
    return check_run(small_run({"train": {"steps": 100, **keys}}), name="small")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"cooldown_steps": 5},
            "train.cooldown_steps is 5, but train.schedule cosine has no cooldown: remove it, or set train.schedule to "
            "wsd",
        ),
        (
            {"schedule": "wsd", "warmup_steps": 81},
            "train.warmup_steps (81) and train.cooldown_steps (20, as it is not set) must fit into the schedule's "
            "steps (100): lower one or set train.decay_steps (that of RUN_DIR/config.yaml, if the run has started)",
        ),
        (
            {"schedule": "wsd", "decay_steps": 50, "cooldown_steps": 49},
            "train.warmup_steps (2) and train.cooldown_steps (49) must fit into the schedule's steps (50): lower one "
            "or raise train.decay_steps",
        ),
        (
            {"schedule": "wsd", "warmup_steps": 100, "cooldown_steps": 200},
            "train.warmup_steps must be less than the schedule's steps (100), got 100: lower it or set "
            "train.decay_steps (that of RUN_DIR/config.yaml, if the run has started)",
        ),
        (
            {"schedule": "exponential"},
            "train.schedule: must be 'cosine', 'linear', 'constant' or 'wsd', got 'exponential'",
        ),
        (
            {"init_from": "a", "branch_from": "b"},
            "train.init_from is a and train.branch_from is b: remove one; a branch continues with optimizer state and "
            "step, train.init_from takes the weights alone",
        ),
    ],
)
def test_keys_of_a_schedule_must_fit_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        small(**keys)
    assert str(caught.value) == f"small: {message}"


def test_a_trunk_may_hold_the_keys_of_its_cooldowns() -> None:
    assert small(schedule="constant", min_learning_rate=1e-4, warmup_steps=200).train.steps == 100


def test_a_cooldown_may_take_all_that_the_warm_up_leaves() -> None:
    train = small(schedule="wsd", cooldown_steps=98, decay_steps=100).train
    assert learning_rate(2, train=train) == train.learning_rate > learning_rate(3, train=train) > 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(*, trained: int, **keys: Any) -> None:
    """Leave what a run has written that was started, and has a checkpoint unless `trained` is 0."""
    text = dump_run(with_fixed_keys(small(**keys), run_dir=Path("new")))
    shutil.rmtree("run", ignore_errors=True)
    Path("run").mkdir()
    Path("run/config.yaml").write_text(text, encoding="utf-8")
    if trained:
        save(Path(f"run/checkpoints/step_{trained:07d}"), text, step=trained)


def changed(**keys: Any) -> str | None:
    """Return why a start with other keys is refused; None if it is not."""
    try:
        with_fixed_keys(small(**keys), run_dir=Path("run"))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.usefixtures("folder")
def test_a_schedule_may_change_ahead_of_the_steps_taken() -> None:
    started(trained=80, schedule="wsd")
    for keys in ({"decay_steps": 200}, {"decay_steps": 100, "cooldown_steps": 10}, {"cooldown_steps": 20}, {}):
        assert changed(schedule="wsd", **keys) is None
    message = changed(schedule="wsd", decay_steps=50)
    assert message is not None
    assert "the learning rate would change from step 41 on, and step 80 is done; " in message
    assert message.endswith(" from a checkpoint of step 40 or before")


def test_what_the_first_start_fixed_must_fit_a_later_cooldown(tmp_path: Path) -> None:
    first = small(schedule="wsd", warmup_steps=10, min_learning_rate=1e-4)
    first = first.model_copy(update={"run": first.run.model_copy(update={"dir": str(tmp_path)})})
    (tmp_path / "config.yaml").write_text(dump_run(with_fixed_keys(first, run_dir=tmp_path)))

    def later(**keys: Any) -> RunConfig:
        return with_fixed_keys(
            first.model_copy(update={"train": first.train.model_copy(update=keys)}), run_dir=tmp_path
        )

    with pytest.raises(InputError) as caught:
        later(steps=200, cooldown_steps=95)  # would fit into 200
    assert str(caught.value).startswith(
        "train.warmup_steps (10) and train.cooldown_steps (95) must fit into the schedule's steps (100): lower "
    )
    (tmp_path / "config.yaml").write_text(dump_run(later(cooldown_steps=30)))
    assert later().train.cooldown_steps == 30, "as decay_steps, it stays what it was"


@pytest.mark.usefixtures("folder")
def test_a_cooldown_that_has_begun_stays() -> None:
    started(trained=81, schedule="wsd")
    assert changed(schedule="wsd", decay_steps=200) == (
        "run holds a run that this one would change: train.decay_steps was 100, is 200: the learning rate would change "
        "from step 81 on, and step 81 is done; set the old values, or continue in another run.dir with "
        "train.branch_from, from a checkpoint of step 80 or before"
    )
    # another key of the schedule is refused as ever, and by name
    message = changed(schedule="linear", decay_steps=200)
    assert message is not None
    assert "train.schedule was 'wsd', is 'linear'; train.decay_steps was 100, is 200: set the old values" in message


@pytest.mark.usefixtures("folder")
def test_other_schedules_may_be_longer_if_their_rates_stay() -> None:
    started(trained=100, schedule="constant")
    assert changed(schedule="constant", decay_steps=10**6) is None
    for schedule in ("cosine", "linear"):
        started(trained=100, schedule=schedule)
        message = changed(schedule=schedule, decay_steps=200)
        assert message is not None
        # no step after the warm-up had the full rate
        assert message.endswith(
            "from step 3 on, and step 100 is done; set the old values, or continue in another "
            "run.dir with train.branch_from"
        )
    # before the first checkpoint no step is done
    started(trained=0)
    assert changed(decay_steps=200) is None


@pytest.mark.usefixtures("folder")
def test_more_steps_than_the_schedule_say_how_to_go_on() -> None:
    def refused(trained: int, **keys: Any) -> str:
        started(trained=trained, **keys)
        config = with_fixed_keys(small(**{**keys, "steps": 200}), run_dir=Path("run"))
        with pytest.raises(InputError) as caught:
            require_learning(config.train, trained=trained)
        return str(caught.value).partition("nothing more would be learned; ")[2]

    assert refused(80, schedule="wsd") == "set train.steps to 100 or train.decay_steps to 200"
    assert changed(schedule="wsd", steps=200, decay_steps=200) is None
    elsewhere = "set train.steps to 100, or continue in another run.dir with train.branch_from"
    assert refused(81, schedule="wsd") == f"{elsewhere}, from a checkpoint of step 80 or before"
    assert refused(50, schedule="linear") == elsewhere
    # a rate that stays above 0 lets a run go on
    for keys in ({"schedule": "constant"}, {"schedule": "wsd", "min_learning_rate": 1e-4}):
        config = small(steps=200, decay_steps=100, **keys)
        require_learning(config.train, trained=100)
        assert zero_from(config.train) is None
        assert finished_line(Path("run"), train=config.train).endswith(" 200: raise train.steps to continue")
    config = small(schedule="wsd", decay_steps=100)
    assert finished_line(Path("run"), train=config.train) == (
        "run is trained to its last step, 100: its learning rate has fallen to 0, so continue in another run.dir with "
        "train.branch_from, from a checkpoint of step 80 or before"
    )


def test_the_default_is_the_cosine_of_earlier_versions() -> None:
    assert load_run("demo").train.schedule == "cosine"
    assert [learning_rate(step, train=train_of(decay_steps=110)) for step in (5, 10, 60)] == [0.5, 1.0, 0.55]
