"""The scripts of docs/multi-node.md: parsed, run with stand-ins for schedulers, and read by the real programs."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from opensloth.cli import data, grpo, program, sft
from tiny import save_tiny_model
from training_fixtures import write_rows

PAGE = (Path(__file__).parent.parent / "docs" / "multi-node.md").read_text(encoding="utf-8")
BASH, YAML = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("bash", "yaml"))
SLURM = next(block for block in BASH if block.startswith("#!"))
JOB = list(yaml.safe_load_all(YAML[0]))[1]["spec"]
SKY = yaml.safe_load(YAML[1])
VARIABLES = {
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "JOB_COMPLETION_INDEX": "1",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}
STANDINS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> called; echo node0; echo node1',
    **dict.fromkeys(("os-sft", "os-grpo", "torchrun"), 'echo "${0##*/} $*" >> called; exit 75'),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with prepared data for both methods under the page's names, and the stand-ins."""
    directory = tmp_path_factory.mktemp("pages")
    save_tiny_model(directory / "model")
    write_rows(directory / "rows.jsonl")
    (directory / "bin").mkdir()
    for name, code in STANDINS.items():
        path = directory / "bin" / name
        path.write_text(f"#!/bin/bash\n{code}\n")
        path.chmod(0o755)
    before = Path.cwd()
    os.chdir(directory)
    try:
        assert program.run(data.app, ["rows.jsonl", "--model", "model", "--output", "data", "--workers", "1"]) == 0
        given = ["sample:arithmetic", "-n", "16", "--model", "model", "--chat-template", "reasoning", "--workers", "1"]
        assert program.run(data.app, [*given, "--method", "grpo", "--output", "prompts"]) == 0
    finally:
        os.chdir(before)
    return directory


def calls(place, script):
    """What the script runs in place of the schedulers' and our programs, and its exit code."""
    (place / "called").unlink(missing_ok=True)
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], cwd=place, env={**VARIABLES, "PATH": path}, check=False, timeout=30)
    return (place / "called").read_text().splitlines(), done.returncode


SCRIPTS = [*BASH, JOB["template"]["spec"]["containers"][0]["args"][0], SKY["run"]]


@pytest.mark.parametrize("script", [*SCRIPTS, SKY["setup"]])
def test_every_script_is_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_real_programs_read_every_command(script, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    ours = [line for line in calls(place, script)[0] if not line.startswith("scontrol")]
    assert ours
    for number, line in enumerate(ours):
        name, *words = shlex.split(line)
        if name == "torchrun":
            place_, words = words[: words.index("-m")], words[words.index("-m") + 2 :]
            assert place_[:4] == ["--nnodes", "2", "--node-rank", str(number)]
            name = "os-sft"
        elif len(ours) == 1:  # a scheduler's second machine
            assert words[words.index("--node-rank") + 1] == "1"
        if "--nnodes" in words:
            assert words[words.index("--rdzv-endpoint") + 1].endswith(":29500")
        if "--gpus" in words:  # there are none here
            words[words.index("--gpus")] = "--processes"
        words[0] = {"os-sft": "data", "os-grpo": "prompts"}[name]
        app = {"os-sft": sft.app, "os-grpo": grpo.app}[name]
        code = program.run(app, [*words, "--dry-run", "--model", "model"])
        assert code == 0, capfd.readouterr()


def test_slurm_warns_the_tasks_and_puts_a_stopped_job_back(place):
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", SLURM))
    assert (options["nodes"], options["ntasks-per-node"], options["signal"]) == ("2", "1", "TERM@300")
    called, code = calls(place, SLURM)
    assert "--rdzv-endpoint node0:29500" in called[1]
    assert (called[2], code) == ("scontrol requeue 7", 75)


def test_the_job_of_kubernetes_numbers_its_pods_and_gives_them_a_name():
    service = next(yaml.safe_load_all(YAML[0]))
    assert service["spec"]["clusterIP"] == "None"
    assert JOB["completionMode"] == "Indexed"
    assert JOB["completions"] == JOB["parallelism"] == 2
    pod = JOB["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"  # else there is no podFailurePolicy
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in JOB["podFailurePolicy"]["rules"]}
    assert codes == {"Ignore": [75], "FailJob": [2]}


def test_skypilot_has_two_machines_and_starts_a_stopped_run_again():
    assert SKY["num_nodes"] == 2
    assert SKY["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "/shared" in SKY["file_mounts"]
