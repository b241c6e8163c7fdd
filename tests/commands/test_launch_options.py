"""Options of `launch`: each is in the job's script, or is refused by name."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from commands.launch import SlurmOptions, launch_slurm, parse_sbatch
from flexbert_core.schema import ConfigError
from tests.helpers.runs import ROOT
from tests.helpers.tiny import write_config


def script(file: Path, **options: Any) -> str:
    both: dict[str, Any] = {"nodes": 1, "gpus_per_node": 2, **options}
    return launch_slurm(file, (), SlurmOptions(**both), True)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["qos="], "--sbatch: qos=: has no value: give one, or say --sbatch qos"),
        (["exclusive", "comment=a", "comment=b"], "--sbatch: comment: is given twice: sbatch takes one"),
        (["--mem=", "x"], "--sbatch: --mem=: has no value: give one, or say --sbatch mem"),
        (["=3"], "--sbatch: '=3': expected an option of sbatch, such as qos=high or exclusive"),
    ],
)
def test_options_of_sbatch_are_used_or_refused(given: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_sbatch(given)
    assert str(error.value) == line
    assert parse_sbatch(["qos=high", "exclusive", "comment=a=b"]) == {"qos": "high", "exclusive": "", "comment": "a=b"}


def test_the_job_is_as_it_was_asked_for(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "real", tiny_data, 2)
    for options, line in (
        ({"sbatch": {"chdir": "/scratch"}}, "--sbatch: chdir: leave it out: the job script decides it"),
        ({"partition": ""}, "--partition: is empty: give one, or leave it out"),
        ({"account": " "}, "--account: is empty: give one, or leave it out"),
    ):
        with pytest.raises(ConfigError) as error:
            script(file, **options)
        assert str(error.value) == line
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    text = script(link, cpus_per_node=64)
    assert f" train {link}" in text
    # The script itself, up to srun, which prints what it is told.
    (tmp_path / "srun").write_text('#!/bin/sh\necho "cpus: $SRUN_CPUS_PER_TASK"\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "scontrol").symlink_to("/bin/true")
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "x"}
    for cpus in ({"SLURM_CPUS_PER_TASK": "64"}, {}):
        variables = {**os.environ, **job, **cpus, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash"], input=text, env=variables, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.stdout == f"cpus: {cpus.get('SLURM_CPUS_PER_TASK', '')}\n", done.stderr


@pytest.mark.parametrize(("given", "cpus"), [({}, 32), ({"gpus_per_node": 4}, 16), ({"cpus_per_node": 7}, 7)], ids=str)
def test_ranks_have_cores_and_are_bound_to_none(
    tiny_data: Path, tmp_path: Path, given: dict[str, int], cpus: int
) -> None:
    """Slurm gives a task one core unless told, and binds to it all that the task starts: eight ranks and their loaders."""
    text = script(write_config(tmp_path, tiny_data, 2), **({"gpus_per_node": 8} | given))
    assert f"#SBATCH --cpus-per-task={cpus}\n" in text
    assert "srun --ntasks-per-node=1 --cpu-bind=none " in text
