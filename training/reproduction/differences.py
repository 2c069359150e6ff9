"""What differs between two starts of a run, or between a start and here and now, and whether it matters. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from configs.figures import byte_size, scaled
from training.reproduction.facts import CPU_VARIABLES, GPU_VARIABLES, INIT_FROM

Grade = Literal["same", "rounding", "other"]
GRADES: dict[Grade, str] = {
    "same": "bit for bit the same",
    "rounding": "same losses up to rounding",
    "other": "another run",
}
"""What a difference may do at worst, the least first."""

# Packages that only prepare, log or export; numpy too: what it computes for a run is integers.
_HARMLESS_PACKAGES = ("python", "trainshort", "sentencepiece", "tokenizers", "mlflow", "transformers", "numpy")
_SETTING_GRADES: dict[str, Grade] = {"train.steps": "same", "run.seed": "other", "train.precision": "other"}
# With dropout: each data rank and stage drops states of its own samples and layers, a micro-batch at a time, and draws
# them with its device's generator, which torch may change.
_DRAWING_AXES, _DRAWING_SETTINGS = ("pipeline", "data"), ("train.micro_batch", "parallel.sequence")
NOT_INSTALLED, _NOT_SET = "not installed", "not set"


@dataclass(frozen=True)
class Difference:
    """One fact that differs.

    Attributes:
        section: The part of the manifest that holds it.
        what, then, now: The fact, and its two values.
        grade: What it may do at worst.
    """

    section: str
    what: str
    then: str
    now: str
    grade: Grade

    def to_json(self) -> dict[str, str]:
        """Return it as plain values."""
        return asdict(self)


def worst_grade(grades: list[Grade]) -> Grade:
    """Return the worst of grades; `same` if there are none."""
    return max(grades, key=list(GRADES).index, default="same")


def is_on_gpu(start: Mapping[str, Any]) -> bool:
    """Return whether the ranks of a start were on GPUs."""
    hardware: Mapping[str, Any] = start["hardware"]
    return hardware.get("device") != hardware.get("cpu")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], *, drops: bool) -> Iterator[Difference]:
    """Yield what differs in code, data, versions, hardware, environment variables, layout and settings.

    Args:
        then: A start in the manifest of reproduction.
        now: A later start; or the same sections of what is here and now, where one that is missing does not differ.
        drops: Whether the run has dropout: what changes which states are dropped makes another run.
    """
    on_gpu, drawn = is_on_gpu(then), grade_drawn(drops)
    yield from _code(then["code"], now["code"])
    yield from _data(then["data"], now["data"])
    yield from _weights(then["weights"], now["weights"])
    for name in dict.fromkeys((*then["versions"], *now["versions"])):
        grade: Grade = "same" if name in _HARMLESS_PACKAGES else drawn if name == "torch" else "rounding"
        versions = [str(each["versions"].get(name) or NOT_INSTALLED) for each in (then, now)]
        yield from _difference("versions", name, versions, grade)
    yield from _hardware(then["hardware"], now["hardware"], on_gpu=on_gpu, device=drawn)
    for name in (*CPU_VARIABLES, *GPU_VARIABLES):
        grade = "rounding" if name in (GPU_VARIABLES if on_gpu else CPU_VARIABLES) else "same"
        values = [each["variables"].get(name, _NOT_SET) for each in (then, now)]
        yield from _difference("variables", name, values, grade)
    if "layout" in now:
        split = any(start.get("settings", {}).get("parallel.sequence") for start in (then, now))
        axes = (*_DRAWING_AXES, "tensor") if split else _DRAWING_AXES  # a part of a sequence drops states of its own
        moved = any(then["layout"].get(axis) != now["layout"].get(axis) for axis in axes)
        yield from _difference("layout", "layout", [layout_text(then), layout_text(now)], grade_drawn(drops and moved))
    for key, value in then["settings"].items() if "settings" in now else ():
        grade = _SETTING_GRADES.get(key, grade_drawn(drops and key in _DRAWING_SETTINGS))
        yield from _difference("settings", key, [_shown(value), _shown(now["settings"].get(key))], grade)


def surviving_starts(starts: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Return the starts that trained steps which later ones kept, each with its number, and the newest."""
    return [
        (number, start)
        for number, start in enumerate(starts, start=1)
        if all(start["step"] < later["step"] for later in starts[number:])
    ]


def layout_text(start: Mapping[str, Any]) -> str:
    """Return the layout of a start in words."""
    layout: Mapping[str, Any] = start["layout"]
    axes = " x ".join(f"{axis} {layout.get(axis)}" for axis in ("tensor", "pipeline", "data"))
    nodes = f" on {layout['nodes']} nodes" if layout.get("nodes", 1) > 1 else ""
    offload = "" if layout.get("offload", "none") == "none" else f", offload {layout['offload']}"
    overlap = ", overlap" if layout.get("overlap") else ""
    return f"{axes}, ZeRO-{layout.get('zero')}{offload}{overlap}{nodes}"


def grade_drawn(drops: bool) -> Grade:
    """Return how much it matters that states are dropped otherwise, in a run that drops some or none."""
    return "other" if drops else "rounding"


def _difference(section: str, what: str, texts: Sequence[str], grade: Grade) -> Iterator[Difference]:
    then, now = texts
    if then != now:
        yield Difference(section, what, then, now, grade)


def _code(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    both = (then.get("sha256", {}), now["sha256"])
    changed = [name for name in dict.fromkeys((*both[0], *both[1])) if both[0].get(name) != both[1].get(name)]
    if not changed:
        return
    # launch starts ranks, and computes nothing
    grade: Grade = "same" if set(changed) <= {"launch", "trainshort.py"} else "other"
    commits = [_commit(each) for each in (then, now)]
    if commits[0] == commits[1]:
        commits = [f"{each} {(hashes.get(changed[0]) or '')[:8]}" for each, hashes in zip(commits, both, strict=True)]
    yield Difference("code", f"code of {', '.join(changed)}", commits[0], commits[1], grade)


def _commit(code: Mapping[str, Any]) -> str:
    commit = code.get("commit")
    return f"{commit[:10]}{' with changes' if code.get('changed') else ''}" if commit else "installed"


def _data(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    key = "sha256" if then.get("sha256") and now.get("sha256") else "fingerprint"
    if now["problem"] is not None or then.get(key) != now.get(key):
        key = key if now["problem"] is None or not then.get("sha256") else "sha256"
        yield Difference("data", "data", _data_text(then, key), now["problem"] or _data_text(now, key), "other")
    if "tokenizer_sha256" in now:
        tokenizers = [str(each.get("tokenizer_sha256"))[:8] for each in (then, now)]
        yield from _difference("tokenizer", "tokenizer", tokenizers, "other")


def _data_text(data: Mapping[str, Any], key: str) -> str:
    return f"{scaled(data.get('tokens') or 0)} tokens, {str(data.get(key))[:8]}"


def _weights(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    if then.get("sha256") != now.get("sha256") or now["problem"] is not None:
        texts = [each.get("problem") or str(each.get("sha256"))[:8] for each in (then, now)]
        yield Difference("weights", then.get("key") or INIT_FROM, texts[0], texts[1], "other")


def _hardware(then: Mapping[str, Any], now: Mapping[str, Any], *, on_gpu: bool, device: Grade) -> Iterator[Difference]:
    yield from _difference("hardware", "device", [str(then.get("device")), str(now["device"])], device)
    if on_gpu:  # else the CPU is the device
        yield from _difference("hardware", "CPU", [str(then.get("cpu")), str(now["cpu"])], "same")
    for name, key in (("GPUs", "gpus"), ("CPU cores", "cores")):
        yield from _difference("hardware", name, [str(then.get(key)), str(now[key])], "same")
    sizes = [byte_size(each.get("memory_bytes") or 0) for each in (then, now)]
    yield from _difference("hardware", "memory", sizes, "same")


def _shown(value: Any) -> str:
    return _NOT_SET if value is None else str(value).lower() if isinstance(value, bool) else str(value)
