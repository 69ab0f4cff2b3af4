"""Every command and program that the README and docs show, as a reader would type it, with a tiny model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from documents import blocks, commands
from opensloth.cli import data, eval, grpo, program, sft, train
from opensloth.data.sources.arithmetic import arithmetic
from tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md", "docs/data.md")}
COMMANDS = [
    pytest.param(command, id=f"{name}: {command.split('  ')[0]}")
    for name, text in PAGES.items()
    for command in commands(text)
]
PROGRAMS = {"os-data": data.app, "os-sft": sft.app, "os-grpo": grpo.app, "os-train": train.app, "os-eval": eval.app}
PREPARED, PROMPTS, RUN, OWN = "data/rows", "data/prompts", "outputs/mine", "outputs/own"
SHORT = ("--max-steps", "1", "--prompts-per-step", "2", "--group-size", "4", "--max-new", "8", "--beta", "0.1")
ROWS = 40


def run(words: list[str]) -> int:
    return program.run(PROGRAMS[words[0]], words[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A reader's folder: their rows, and what the README's own commands make of them."""
    folder = tmp_path_factory.mktemp("reader")
    save_tiny_model(folder / "model")  # it imports torch, which os-data would hide from this process
    text = "".join(json.dumps(row) + "\n" for row in arithmetic("train", ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in re.findall(r"\S*rows\.jsonl", "\n".join(commands(PAGES["README.md"]))):
            Path(name).write_text(text)
        Path("my_rewards.py").write_text(block(PAGES["docs/training.md"], "def brevity"))
        made = (f"os-data rows.jsonl .*--output {PREPARED}", f"os-data .*--output {PROMPTS}")
        for first in (*made, f"os-sft {PREPARED} --output {RUN}"):
            command = next(line for line in commands(PAGES["README.md"]) if re.match(first, line))
            assert run(typed(command)) == 0
        for name in set(re.findall(r"data/sft_\w+", "\n".join(commands(PAGES["docs/data.md"])))):
            shutil.copytree(PREPARED, name)
        yield folder


def block(text: str, part: str) -> str:
    """The one Python program of a page that holds `part`."""
    (found,) = [source for source in blocks(text, "python") if part in source]
    return found


def typed(command: str) -> list[str]:
    """The words of a command, with the tiny model in the place of a real one, or what was trained of it."""
    words = shlex.split(command, comments=True)
    model = RUN if words[0] == "os-eval" else "model"
    return [model if before == "--model" else word for before, word in zip(["", *words], words, strict=False)]


def long(words: list[str]) -> bool:
    """Training is long, but where the run is already there: then the command is run again, as the README says."""
    return words[0] != "os-data" and "--dry-run" not in words and not again(words)


def again(words: list[str]) -> bool:
    return RUN in words and words[0] != "os-eval"


@pytest.mark.parametrize("command", [case for case in COMMANDS if case.values[0].startswith("os-")])
def test_a_documented_command_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = typed(command)
    status = run([*words, "--dry-run"] if long(words) else words)
    shown = capsys.readouterr()
    assert status == 0, shown.err
    if again(words):
        assert "already finished" in shown.out


@pytest.mark.parametrize("command", [case for case in COMMANDS if case.values[0].startswith("torchrun")])
def test_a_documented_launch_by_torchrun_runs(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [*typed(command), "--dry-run"]
    done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Nothing was written") == 1


def test_every_other_documented_command_names_what_is_there() -> None:
    known = {"git", "make", "pip", "tensorboard", "torchrun", *PROGRAMS}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M)
    for text in PAGES.values():
        for command in commands(text):
            words = shlex.split(command, comments=True)
            assert words[0] in known, command
            if words[0] == "make":
                assert set(words[1:]) <= set(targets), command
            if words[0] == "pip":
                assert set(re.findall(r"\w+", words[2])) <= set(extras), command


def test_the_readmes_program_loads_the_adapter(folder: Path) -> None:
    (source,) = blocks(PAGES["README.md"], "python")
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["model"].peft_config["default"].base_model_name_or_path == str(folder / "model")


@pytest.fixture(scope="module")
def logged(folder: Path) -> dict[str, float]:
    """The metrics of one step of GRPO on the rewards that docs/training.md shows, with a KL divergence."""
    (command,) = [line for line in commands(PAGES["docs/training.md"]) if OWN in line]
    assert run([*typed(command), *SHORT]) == 0
    metrics: dict[str, float] = json.loads(Path(OWN, "metrics.jsonl").read_text().splitlines()[0])
    return metrics


def test_the_documented_rewards_score(logged: dict[str, float]) -> None:
    assert 0 < logged["rewards/brevity/mean"] <= 1
    assert 0 <= logged["rewards/shows_numbers/mean"] <= 1


def test_the_documented_program_reads_rollouts(logged: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    exec(block(PAGES["docs/training.md"], "rollouts/step_1"), {})
    shown = capsys.readouterr().out
    assert len(re.findall(r"^[+-]\d\.\d\d (?:right|wrong) \d+ \| ", shown, flags=re.M)) == 8


def test_the_documented_metrics_are_logged(logged: dict[str, float]) -> None:
    table = PAGES["docs/training.md"].split("### Metrics of GRPO")[1].split("\n\n")[1]
    rows = [row.split("|")[1].replace("NAME", "brevity") for row in table.splitlines()[2:]]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    families = [name.removesuffix("...") for name in names if name.endswith("...")]
    assert set(names) - {"min_", "max_"} - {f"{family}..." for family in families} <= logged.keys()
    assert all(any(name.startswith(family) for name in logged) for family in families)


def test_tensorboard_finds_curves_where_the_readme_looks(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (command,) = [line for line in commands(PAGES["README.md"]) if line.startswith("tensorboard")]
    events = EventAccumulator(shlex.split(command)[2])
    events.Reload()
    assert any("loss" in name for name in events.Tags()["scalars"])
