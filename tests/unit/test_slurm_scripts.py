"""The sbatch scripts: what they ask for, that bash reads them, that odd names survive, how they are submitted."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError, MachineError
from configs.load import RUNS, check_run, load_run
from launch.slurm import fewest_nodes, option_value, ranks_per_node, render, submit

SHIPPED = sorted(file.stem for file in RUNS.glob("*.yaml"))


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def render_run(name: str, *overrides: str, nodes: int | None = None) -> dict[str, str]:
    config = load_run(name, overrides=overrides)
    return render(
        config,
        run_file=name,
        nodes=nodes or fewest_nodes(config),
        overrides=overrides,
        folder=Path("/home/someone"),
    )


@pytest.mark.parametrize("run", SHIPPED)
def test_every_shipped_run_renders_scripts_that_bash_reads(run: str) -> None:
    assert load_run(run).slurm.partition is None
    scripts = render_run(run)
    assert list(scripts) == ["train", "evaluate", "export"]
    for script in scripts.values():
        assert script.startswith("#!/bin/bash\n#SBATCH ")
        assert "--partition" not in script
        assert script.endswith("\n")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert len(script.splitlines()) < 45


def test_the_reference_job_asks_for_its_nodes_and_gpus() -> None:
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
    assert "srun --kill-on-bad-exit=1 \\\n  trainshort train alibi-1b3 --set " in scripts["train"]
    for name in ("evaluate", "export"):
        assert sbatch_lines(scripts[name])[:4] == [
            f"--job-name=alibi-1b3-{name}",
            "--nodes=1",
            "--ntasks-per-node=1",
            "--gpus-per-node=1",
        ]
    assert "  trainshort evaluate runs/alibi-1b3\n" in scripts["evaluate"]
    assert "  trainshort export runs/alibi-1b3 --format hf --out runs/alibi-1b3/export/hf\n" in scripts["export"]


def test_cpu_ranks_ask_for_no_gpu() -> None:
    assert all("gpus" not in line for script in render_run("demo").values() for line in sbatch_lines(script))


@pytest.mark.parametrize(("nodes", "expected"), [(1, 4), (2, 2), (3, 4), (4, 1), (8, 1)])
def test_cpu_ranks_make_whole_copies_of_the_model(run_values: dict[str, Any], nodes: int, expected: int) -> None:
    run_values["slurm"] = {"gpus_per_node": 0}
    assert ranks_per_node(check_run(run_values, name="small"), nodes=nodes) == expected


def test_ranks_of_a_node_are_as_set_else_one_a_gpu(run_values: dict[str, Any]) -> None:
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


def words_of(script: str, program: str) -> list[str]:
    """Return the arguments that bash gives a program, by running the script with everything else stubbed."""
    stubs = """
    scontrol() { echo node1; }
    scancel() { :; }
    srun() { printf '%s\\0' "$PWD" "$ODD" "$MASTER_ADDR:$MASTER_PORT" "$OMP_NUM_THREADS" "$@"; }
    """
    done = subprocess.run(
        ["bash", "-c", stubs + script],
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_ON_NODE": "16"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def test_odd_names_reach_the_ranks_unharmed(run_values: dict[str, Any], tmp_path: Path) -> None:
    odd = 'it\'s "odd" $HOME `x` \\ 100%'
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    run_values["run"]["dir"] = f"runs/{odd}"
    run_values["slurm"] = {"gpus_per_node": 4, "env": {"ODD": odd}, "container": f"/images/{odd}.sqsh"}
    overrides = [f"track.experiment={odd}", "train.steps=5"]
    scripts = render(
        check_run(run_values, name="small"), run_file=f"{odd}.yaml", nodes=1, overrides=overrides, folder=folder
    )
    assert words_of(scripts["train"], "srun") == [
        str(folder),
        odd,
        "node1:12007",
        "4",
        "--kill-on-bad-exit=1",
        f"--container-image=/images/{odd}.sqsh",
        "trainshort",
        "train",
        f"{odd}.yaml",
        "--set",
        overrides[0],
        "--set",
        overrides[1],
    ]
    output = next(line for line in sbatch_lines(scripts["train"]) if line.startswith("--output="))
    # sbatch takes an #SBATCH line apart like the shell, expanding nothing; %% is its way to write a %.
    assert shlex.split(output) == [f"--output={folder}/runs/{odd.replace('%', '%%')}/logs/slurm-train-%j.log"]


@pytest.mark.parametrize("value", ["gpu", "a100|h100", "2-00:00:00", "two words", 'a"b', "back\\slash", "it's"])
def test_option_values_are_quoted_only_where_needed(value: str) -> None:
    assert shlex.split(option_value(value), comments=True) == [value]
    assert option_value("a100|h100") == "a100|h100"


def fake_sbatch(folder: Path, body: str) -> None:
    program = folder / "sbatch"
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)


def test_submitted_jobs_wait_for_each_other(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, f'echo "$@" >>{tmp_path}/calls; echo "$((100 + $(wc -l <{tmp_path}/calls)));cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    config = check_run(run_values, name="small")
    scripts = render(config, run_file="small.yaml", nodes=1, folder=tmp_path)
    assert submit(scripts, config=config) == {"train": "101", "evaluate": "102", "export": "103"}
    folder = tmp_path / "run" / "slurm"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {folder}/train.sbatch",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {folder}/evaluate.sbatch",
        f"--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes {folder}/export.sbatch",
    ]
    assert (folder / "train.sbatch").read_text() == scripts["train"]
    assert (tmp_path / "run" / "logs").is_dir()


def test_a_refusing_or_missing_sbatch_is_named(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_run(run_values, name="small")
    scripts = render(config, run_file="small.yaml", nodes=1, folder=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="sbatch is not on this machine: run this on a SLURM login node"):
        submit(scripts, config=config)
    fake_sbatch(tmp_path, '[[ $2 == --dep* ]] || { echo 7; exit 0; }; echo "sbatch: error: no such qos" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(MachineError, match=r"sbatch refused .*evaluate.sbatch \(submitted before it: 7\): .*such qos"):
        submit(scripts, config=config)
