"""The tutorial's scripts, unmodified, against a hub on 127.0.0.1; and every command and program its README shows."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from documents import blocks, commands
from loopback_hub import LoopbackHub, files_of
from opensloth.data.sources.arithmetic import arithmetic
from tiny import save_tiny_model

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "grpo_tutorial"
README = (TUTORIAL / "README.md").read_text(encoding="utf-8")
ROWS = 40
NOT_NUMBERS = ("x + 1", "\\frac{1}{2}")


@dataclass
class Project:
    """A folder that holds nothing but the tutorial, as if it were the clone."""

    root: Path
    env: dict[str, str]

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run from another folder than the project's root, as a user may."""
        here = self.root / "grpo_tutorial"
        run = subprocess.run(command, cwd=here, env=self.env | env, capture_output=True, text=True, timeout=240)
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run

    def script(self, name: str, *options: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.root / "grpo_tutorial" / "scripts" / name), *options, check=check, **env)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(TUTORIAL, root / "grpo_tutorial", ignore=shutil.ignore_patterns("data", "__pycache__"))
    rows = list(arithmetic("train", ROWS))
    for row, answer in zip(rows, NOT_NUMBERS, strict=False):
        row["expected_answer"] = answer
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    splits = [{"split": "cot", "path": "data/cot-*"}, {"split": "tir", "path": "data/tir-*"}]
    card = f"---\nconfigs: {json.dumps([{'config_name': 'default', 'data_files': splits}])}\n---\n".encode()
    files = {"README.md": card, "data/cot-0.parquet": table.getvalue(), "data/tir-0.parquet": table.getvalue()}
    with LoopbackHub() as hub:
        hub.publish("datasets", "unsloth/OpenMathReasoning-mini", files)
        hub.publish("datasets", "openai/gsm8k", gsm8k())
        hub.publish("models", "unsloth/Qwen3-4B-Base", files_of(save_tiny_model(root / "model", "qwen3")))
        env = hub.environment(root / "cache") | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        for name in ("MODEL", "SFT_DATASET", "SFT_SAMPLES", "GPU_COUNT", "MAX_STEPS", "OUTPUT"):
            env.pop(name, None)
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        yield Project(root, env)


def gsm8k() -> dict[str, bytes]:
    row = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row] * 3), table)
    config = [{"config_name": "main", "data_files": [{"split": "train", "path": "main/train-*"}]}]
    return {
        "README.md": f"---\nconfigs: {json.dumps(config)}\n---\n".encode(),
        "main/train-0.parquet": table.getvalue(),
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prepared(project: Project) -> Path:
    project.script("00_prepare_sft_dataset.sh")
    return project.root / "data" / "sft_openmath_prepared"


@pytest.fixture(scope="module")
def trained(project: Project, prepared: Path) -> Path:
    project.script("01_train_sft.sh", MAX_STEPS="2")
    return project.root / "outputs" / "sft_qwen_reasoning_model"


def test_preparation_keeps_the_rows_whose_answer_is_a_number(project: Project, prepared: Path) -> None:
    rows = lines(project.root / "grpo_tutorial" / "data" / "sft_openmath_raw.jsonl")
    assert len(rows) == ROWS - len(NOT_NUMBERS)
    assert all(set(row) == {"problem", "generated_solution", "expected_answer"} for row in rows)
    assert all(float(row["expected_answer"].replace(",", "")) is not None for row in rows)
    assert not any("<think>" in row["generated_solution"] for row in rows)


def test_preparation_renders_the_reasoning_contract(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_kept"] == ROWS - len(NOT_NUMBERS)
    assert manifest["shards"] == 1
    contract = json.loads((prepared / "prompt.json").read_text())
    assert contract["tags"]["solution_start"] == "<SOLUTION>"


def test_samples_must_be_a_number(project: Project) -> None:
    run = project.script("00_prepare_sft_dataset.sh", check=False, SFT_SAMPLES="many")
    assert run.returncode == 2
    assert "SFT_SAMPLES" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_dataset_and_all_answers_can_be_chosen(project: Project) -> None:
    script = "prepare_sft_data.py"
    output = "grpo_tutorial/data/other.jsonl"
    project.script(script, "--all-answers", "--output", output)
    assert len(lines(project.root / output)) == ROWS
    project.script(script, "--dataset", "openai/gsm8k", "--subset", "main", "--output", output)
    assert lines(project.root / output)[0] == {
        "problem": "What is 2 + 3?",
        "generated_solution": "2 + 3 = 5",
        "expected_answer": "5",
    }
    missing = project.script(script, "--dataset", "a/missing", "--output", output, check=False)
    assert missing.returncode == 2
    assert "a/missing" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_training_leaves_an_adapter_with_its_contract(trained: Path, prepared: Path) -> None:
    assert (trained / "adapter_model.safetensors").is_file()
    assert (trained / "tokenizer.json").is_file()
    assert (
        json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == "unsloth/Qwen3-4B-Base"
    )
    assert (trained / "prompt.json").read_bytes() == (prepared / "prompt.json").read_bytes()
    assert any((trained / "tensorboard").rglob("events.*"))


def test_a_finished_training_says_so(project: Project, trained: Path) -> None:
    adapter = (trained / "adapter_model.safetensors").read_bytes()
    again = project.script("01_train_sft.sh", MAX_STEPS="2")
    assert "finished" in again.stdout + again.stderr
    assert (trained / "adapter_model.safetensors").read_bytes() == adapter


def test_end_to_end_gives_the_adapter_of_the_two_scripts(project: Project, trained: Path) -> None:
    from safetensors.numpy import load_file

    project.script("01_sft_end_to_end.sh", MAX_STEPS="2", OUTPUT="outputs/end_to_end")
    short = load_file(project.root / "outputs" / "end_to_end" / "adapter_model.safetensors")
    long = load_file(trained / "adapter_model.safetensors")
    assert short.keys() == long.keys()
    assert all((short[name] == long[name]).all() for name in long)


def test_the_readmes_scripts_and_programs_exist() -> None:
    known = {"pip", "python3", "os-data", "os-sft", "os-train", "tensorboard"}
    for command in commands(README):
        words = shlex.split(command, comments=True)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            assert words.pop(0).split("=")[0] in README.split("| variable |")[1].split("## Step")[0]
        assert words[0] in known or (ROOT / words[0]).is_file(), command


def messages() -> list[str]:
    """What the troubleshooting table says the product prints; `...` stands for what differs."""
    table = README.split("## When something goes wrong")[1].split("\n## ")[0]
    return re.findall(r"^\| `(.+?)`", table, flags=re.M)


@pytest.mark.parametrize("message", messages())
def test_troubleshooting_quotes_the_products_own_messages(message: str) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    for fixed in filter(None, (part.strip() for part in message.split("..."))):
        assert fixed in source, f"nothing prints {fixed!r}"


def dry(command: str) -> str:
    """The command without its effect: each is run for real by its script."""
    looks = "os-data show" in command or "--dry-run" in command
    return command if looks else f"{command.rstrip()} --dry-run"


@pytest.mark.parametrize("command", sorted({dry(c) for c in commands(README) if c.startswith("os-")}))
def test_a_command_of_the_readme_runs(command: str, project: Project, prepared: Path, trained: Path) -> None:
    words = shlex.split(command)
    before = sorted(p for p in project.root.rglob("*") if "cache" not in p.parts)
    run = subprocess.run(words, cwd=project.root, env=project.env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    after = sorted(p for p in project.root.rglob("*") if "cache" not in p.parts)
    assert [p for p in after if p not in before] in ([], [project.root / "data" / "sft_openmath.html"])


def test_the_readmes_inference_program_uses_the_contracts_prompt(project: Project, trained: Path) -> None:
    program = next(block for block in blocks(README, "python") if "AutoPeftModelForCausalLM" in block)
    program = program.replace("max_new_tokens=512", "max_new_tokens=8")
    check = """
from pathlib import Path
from opensloth.data.messages.examples import Example
from opensloth.data.prompt.choose import PromptContract
contract = PromptContract.load(Path(run) / "prompt.json")
assert prompt["input_ids"][0].tolist() == contract.prompt_ids(tokenizer, contract.messages(Example(tuple(messages))))
"""
    run = subprocess.run(
        [sys.executable, "-c", program + check], cwd=project.root, env=project.env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_preparation_can_be_run_again_with_other_settings(project: Project, prepared: Path) -> None:
    # The last test: it replaces the data that the others use.
    before = (prepared / "manifest.json").read_bytes()
    again = project.script("00_prepare_sft_dataset.sh")
    assert "already prepared" in again.stderr
    assert (prepared / "manifest.json").read_bytes() == before
    project.script("00_prepare_sft_dataset.sh", SFT_SAMPLES="10", GPU_COUNT="2")
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert (manifest["rows_in"], manifest["shards"]) == (10, 2)
