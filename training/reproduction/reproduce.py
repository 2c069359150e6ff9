"""Compare a run with what is here and now, and tell which commands repeat it. Imports no torch."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from configs.commands import typed_path
from configs.errors import InputError
from configs.path_text import require_folder
from configs.paths import config_file, data_folder, environment_path, own_data_folder, reproduction_file, rollbacks_file
from configs.schema import RunConfig
from configs.strict_yaml import plain_yaml
from data_pipeline.manifest_file import read_data_manifest
from training.averaging.record import averaged_steps, mean_of_steps
from training.incarnation import newest_incarnation
from training.reproduction.differences import (
    GRADES,
    NOT_INSTALLED,
    Difference,
    Grade,
    differences,
    grade_drawn,
    is_on_gpu,
    layout_text,
    surviving_starts,
    worst_grade,
)
from training.reproduction.facts import BRANCH_FROM, INIT_FROM, begins_with
from training.reproduction.here import (
    FoundConfig,
    Here,
    begins_with_here,
    data_of,
    facts_here,
    find_config,
    prepares_the_same,
)
from training.reproduction.starts import recorded_starts
from training.rollbacks import inherited_and_own, read_rollbacks, rollbacks_of, trunk_folder

SECTIONS = ("code", "configuration", "data", "tokenizer", "weights", "versions", "hardware", "variables", "layout")


@dataclass(frozen=True)
class StartChange:
    """What a later start of a run changed.

    Attributes:
        number: The start, counted from 1.
        step: The step that it began from.
        difference: What it changed.
    """

    number: int
    step: int
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"start": self.number, "step": self.step, **self.difference.to_json()}


@dataclass(frozen=True)
class Reproduction:
    """How a run can be repeated here and now.

    Attributes:
        run_dir: The run folder.
        starts: Its starts, as the manifest has them.
        differences: What differs from the newest start.
        changes: What differs between its starts.
        notes: What else to know.
        commands: What to type to repeat the run in a new folder.
        verified: Whether every byte of data and weights was read.
    """

    run_dir: Path
    starts: list[dict[str, Any]]
    differences: list[Difference]
    changes: list[StartChange]
    notes: list[str]
    commands: list[str]
    verified: bool

    @property
    def grade(self) -> Grade:
        """What the repeated run is at worst."""
        return worst_grade([each.grade for each in (*self.differences, *(each.difference for each in self.changes))])

    @property
    def same(self) -> list[str]:
        """The sections in which nothing differs."""
        differing = {each.section for each in self.differences}
        differing |= {"tokenizer"} if "data" in differing else set()  # it lies with the data
        return [section for section in SECTIONS if section not in differing]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "run_dir": str(self.run_dir),
            "grade": self.grade,
            "verdict": GRADES[self.grade],
            "differences": [each.to_json() for each in self.differences],
            "same": self.same,
            "starts": [
                {key: start.get(key) for key in ("started_at", "step", "command", "folder")} for start in self.starts
            ],
            "changes": [each.to_json() for each in self.changes],
            "notes": self.notes,
            "commands": self.commands,
            "verified": self.verified,
        }


def compare_with_here(run_dir: Path, *, here: Here, reads_all: bool) -> Reproduction:
    """Compare the newest start of a run with what is here and now, and its starts with each other.

    Args:
        run_dir: The run folder.
        here: This machine.
        reads_all: Whether to read every byte of data and weights.
    Raises:
        InputError: there is no run folder, no manifest of reproduction, or no run file that can be read.
    """
    require_folder(run_dir, what="run folder", advice="give the run.dir of a run that was trained")
    starts = recorded_starts(run_dir)
    if not starts:
        raise _no_manifest(run_dir)
    surviving = surviving_starts(starts)
    weights = surviving[0][1]["weights"]  # later starts went on from the run's own checkpoints
    surviving = [(number, {**each, "weights": weights}) for number, each in surviving]
    start = surviving[-1][1]
    found = find_config(run_dir, start)
    now = facts_here(run_dir, found.config, start, here=here, reads_all=reads_all)
    drops = found.config.model.dropout > 0
    differing = [
        *([found.difference] if found.difference else []),
        *differences(start, now, drops=drops),
        *_layout_here(start, here, drops=drops),
    ]
    if now["weights"]["problem"] is None:
        differing += _rollbacks_here(run_dir, found.config, start, first_step=surviving[0][1]["step"])
    if now["data"]["problem"] is not None and prepares_the_same(found.config, start):
        differing = [_prepared_again(each) if each.section == "data" else each for each in differing]
    changes = [
        StartChange(number, later["step"], difference)
        for (_, earlier), (number, later) in pairwise(surviving)
        for difference in differences(earlier, later, drops=drops)
    ]
    return Reproduction(
        run_dir=run_dir,
        starts=starts,
        differences=differing,
        changes=changes,
        notes=list(_notes(run_dir, surviving, differing, lacks_weights=now["weights"]["problem"] is not None)),
        commands=_commands(run_dir, found, start, differing, here=here),
        verified=reads_all,
    )


def _no_manifest(run_dir: Path) -> InputError:
    """Return the error of a run folder without a manifest: it says which facts there are all the same."""
    if steps := averaged_steps(run_dir):
        return InputError(f"{run_dir} is {mean_of_steps(steps)}: make it again with `trainshort checkpoint average`")
    file = reproduction_file(run_dir)
    facts = []
    try:
        recorded: dict[str, Any] = json.loads(environment_path(run_dir).read_text(encoding="utf-8"))
        packages, code = recorded.get("packages") or {}, recorded.get("code") or {}
        facts.append(
            f"environment.json (trainshort {packages.get('trainshort')}, torch {packages.get('torch')}, device "
            f"{recorded.get('device')}, {recorded.get('world_size')} ranks"
            f"{', commit ' + str(code.get('commit'))[:10] if code else ''})"
        )
    except (OSError, ValueError, AttributeError):
        pass
    manifest = read_data_manifest(own_data_folder(run_dir))
    facts += [f"data of fingerprint {manifest.inputs_sha256[:8]}"] if manifest else []
    facts += [config_file(run_dir).name] if config_file(run_dir).is_file() else []
    if not facts and newest_incarnation(run_dir) is None:
        return InputError(f"{run_dir} has no {file.name}: give the run.dir of a run that was trained")
    return InputError(
        f"{run_dir} has no {file.name}, which each start of this version writes; of what decides its result there is "
        f"{'; '.join(facts) or 'nothing'}: compare that yourself, or train it again"
    )


def _layout_here(start: Mapping[str, Any], here: Here, *, drops: bool) -> Iterator[Difference]:
    """Yield why this machine cannot have the layout of a start, on which dropout depends, or not repeat its bits."""
    layout = start["layout"]
    needed = -(-layout.get("ranks", 1) // layout.get("nodes", 1))
    if not is_on_gpu(start):
        return
    if here.gpus < needed:
        lacking = f"needs {needed} GPUs, {here.gpus} here"
        yield Difference("layout", "layout", layout_text(start), lacking, grade_drawn(drops))
    if not start["settings"].get("train.deterministic"):
        yield Difference("settings", "train.deterministic", "false", "GPUs repeat no bits without it", "rounding")


def _rollbacks_here(
    run_dir: Path, config: RunConfig, start: Mapping[str, Any], *, first_step: int
) -> Iterator[Difference]:
    """Yield how the rollbacks of a branch's trunk have changed since it began: it leaves out what they left out."""
    beginning = begins_with_here(config, start)
    if beginning is None or beginning[0] != BRANCH_FROM:
        return
    inherited, _ = inherited_and_own(run_dir)
    trunk = trunk_folder(config.train.model_copy(update={"branch_from": beginning[1]}))
    then, now = (
        ", ".join(f"to step {rollback.step}" for rollback in rollbacks if rollback.step >= first_step) or "none"
        for rollbacks in (inherited, rollbacks_of(trunk))
    )
    if then != now:
        yield Difference("weights", f"rollbacks of {trunk.name}", then, now, "other")


def _prepared_again(data: Difference) -> Difference:
    return Difference(data.section, data.what, data.then, f"{data.now}; its sources are as then", "same")


def _notes(
    run_dir: Path, surviving: list[tuple[int, dict[str, Any]]], differing: list[Difference], *, lacks_weights: bool
) -> Iterator[str]:
    """Yield what else to know before repeating a run: how to restore its code and package versions."""
    first, start = surviving[0][1], surviving[-1][1]
    if first["step"] and first["weights"].get("key") == BRANCH_FROM:
        yield f"steps 1 to {first['step']} are those of {first['weights']['path']}, which it branches off from"
    elif first["step"]:
        yield f"steps 1 to {first['step']} were trained by a version that kept no manifest: what they ran is not known"
    if lacks_weights:
        key = first["weights"].get("key") or INIT_FROM
        yield f"bring the checkpoint of {key} back first, or add --set {key}=PATH with where it is now"
    if rollbacks := read_rollbacks(run_dir):
        times = "once" if len(rollbacks) == 1 else f"{len(rollbacks)} times"
        yield (
            f"it diverged and went back {times}: with the copy of {rollbacks_file(run_dir).name} the same samples are "
            "left out, whether or not it diverges again"
        )
    nodes = start["layout"].get("nodes", 1)
    if nodes > 1:
        yield f"it ran on {nodes} nodes, of which this is one at most"
    if any(each.section == "code" and each.grade == "other" for each in differing):
        commit, changed = start["code"].get("commit"), start["code"].get("changed")
        diff = f", and apply the diff in {environment_path(run_dir)}" if changed else ""
        yield f"for the same code: git checkout {commit}{diff}" if commit else "install the same code"
    versions = [each for each in differing if each.section == "versions" and each.grade != "same"]
    if wanted := [f"{each.what}=={each.then}" for each in versions if each.then != NOT_INSTALLED]:
        yield f"for the same versions: pip install {' '.join(map(shlex.quote, wanted))}"
    if any(each.section in ("data", "tokenizer") for each in differing) and start.get("folder") != str(Path.cwd()):
        yield f"relative paths of the run file begin in {start.get('folder')}"


def _commands(
    run_dir: Path,
    found: FoundConfig,
    start: Mapping[str, Any],
    differing: list[Difference],
    *,
    here: Here,
) -> list[str]:
    """Return the commands that repeat a run in a new folder, from here."""
    config, layout = found.config, start["layout"]
    again = next(folder for folder in _new_folders(run_dir) if not folder.exists())
    overrides = {"run.dir": plain_yaml(str(again))}
    if prepares := any(each.section in ("data", "tokenizer") for each in differing):
        overrides |= {"data.dir": "null"} if config.data.dir else {}
    elif config.data.dir is None or data_of(run_dir, config, start) != data_folder(config):
        overrides["data.dir"] = plain_yaml(str(data_of(run_dir, config, start)))
    if config.track.hook:
        overrides["track.hook"] = "null"  # else copies of its checkpoints would replace those of the run
    beginning = begins_with_here(config, start)
    if beginning is not None and beginning != begins_with(config):
        key, path = beginning
        overrides[key] = plain_yaml(path)
    sets = "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in overrides.items())
    file = typed_path(found.file)
    prepare = [f"trainshort prepare {file}{sets}"] if prepares else []
    if read_rollbacks(run_dir):
        folder = typed_path(again)
        prepare.append(f"mkdir -p {folder} && cp {typed_path(rollbacks_file(run_dir))} {folder}")
    ranks, nodes = layout.get("ranks", 1), layout.get("nodes", 1)
    if layout.get("starter") == "slurm":
        return [*prepare, f"trainshort slurm {file} --nodes {nodes} --submit{sets}"]
    if layout.get("starter") == "torchrun":
        starter = f"torchrun --nnodes {nodes} --nproc-per-node {ranks // nodes} --no-python trainshort train {file}"
    else:
        starter = f"trainshort train {file} --ranks {ranks}"
    return [*prepare, f"{_variables(start, differing, here=here)}{starter}{sets}"]


def _new_folders(run_dir: Path) -> Iterator[Path]:
    run_dir = run_dir if run_dir.name not in ("", "..") else run_dir.resolve()
    yield run_dir.with_name(f"{run_dir.name}-again")
    yield from (run_dir.with_name(f"{run_dir.name}-again-{number}") for number in count(2))


def _variables(start: Mapping[str, Any], differing: list[Difference], *, here: Here) -> str:
    """Return what to write before a command so that it has the environment variables of a start."""
    changed = [each.what for each in differing if each.section == "variables"]
    then = start["variables"]
    given = [f"{name}={shlex.quote(then[name])}" for name in changed if name in then]
    unset = [f"-u {name}" for name in changed if name not in then and name in here.variables]
    if here.gpus and not is_on_gpu(start):
        given.append("CUDA_VISIBLE_DEVICES=")  # else `train` would start GPU ranks
    words = ["env", *unset, *given] if unset else given
    return "".join(f"{word} " for word in words)
