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
from opensloth.data.messages.examples import Example
from opensloth.data.prepared.directory import open_prepared
from opensloth.data.prompt.choose import contract_for
from opensloth.data.sources.arithmetic import arithmetic
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "grpo_tutorial"
README = (TUTORIAL / "README.md").read_text(encoding="utf-8")
ROWS = 40
NOT_NUMBERS = ("x + 1", "\\frac{1}{2}")
DAPO = "open-r1/DAPO-Math-17k-Processed"
GUESSING_STEPS = 150
SHORT = ("--max-new", "24")  # more would only take longer
VARIABLES = ("MODEL", "SFT_DATASET", "SFT_SAMPLES", "SFT_MODEL", "GRPO_DATASET", "GRPO_SAMPLES")


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
    splits = [{"split": "cot", "path": "data/cot-*"}, {"split": "tir", "path": "data/tir-*"}]
    files = {"README.md": card({"default": splits}), "data/cot-0.parquet": table(rows)}
    with LoopbackHub() as hub:
        hub.publish("datasets", "unsloth/OpenMathReasoning-mini", files | {"data/tir-0.parquet": table(rows)})
        hub.publish("datasets", "openai/gsm8k", gsm8k())
        hub.publish("datasets", DAPO, dapo())
        hub.publish("models", "unsloth/Qwen3-4B-Base", files_of(save_guessing_model(root / "model")))
        env = hub.environment(root / "cache") | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        for name in (*VARIABLES, "GPU_COUNT", "MAX_STEPS", "OUTPUT"):
            env.pop(name, None)
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        yield Project(root, env)


def table(rows: list[Any]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), written)
    return written.getvalue()


def card(subsets: dict[str, list[dict[str, str]]]) -> bytes:
    configs = [{"config_name": name, "data_files": files} for name, files in subsets.items()]
    return f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()


def gsm8k() -> dict[str, bytes]:
    row = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    subsets = {"main": [{"split": "train", "path": "main/train-*"}]}
    return {"README.md": card(subsets), "main/train-0.parquet": table([row] * 3)}


def dapo() -> dict[str, bytes]:
    """Three subsets, as the real one has; only the rows of `en` are problems that can be read."""
    english = [
        {
            "prompt": row["problem"],
            "solution": row["expected_answer"],
            "data_source": "math_dapo",
            "ability": "MATH",
            "reward_model": {"ground_truth": row["expected_answer"], "style": "rule-lighteval/MATH_v2"},
        }
        for row in arithmetic("train", ROWS)
    ]
    subsets = {name: [{"split": "train", "path": f"{name}/train-*"}] for name in ("all", "cn", "en")}
    chinese = table([{"prompt": "...", "solution": "0"}])
    files = {"all/train-0.parquet": chinese, "cn/train-0.parquet": chinese, "en/train-0.parquet": table(english)}
    return {"README.md": card(subsets), **files}


def save_guessing_model(path: Path) -> Path:
    """A tiny model that answers in the tutorial's format with numbers at random: some are right, as GRPO needs it."""
    import torch

    tokenizer = tiny_tokenizer(chat_template=None)
    model = tiny_model(tokenizer, "qwen3")
    contract = contract_for(tokenizer, "reasoning", None, None)
    answers = [
        f"{number}<end_working_out><SOLUTION>{number}</SOLUTION>{tokenizer.eos_token}" for number in range(10, 60)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = list(arithmetic("train", len(answers)))
    for step in range(GUESSING_STEPS):
        row, answer = rows[step % len(rows)], answers[step * 7 % len(answers)]
        messages = contract.messages(Example(({"role": "user", "content": row["problem"]},)))
        prompt = contract.prompt_ids(tokenizer, messages)
        completion = tokenizer.encode(answer, add_special_tokens=False)
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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


@pytest.fixture(scope="module")
def prompts(project: Project, trained: Path) -> Path:
    project.script("02_prepare_grpo_dataset.sh")
    return project.root / "data" / "grpo_dapo_prepared"


@pytest.fixture(scope="module")
def improved(project: Project, prompts: Path) -> Path:
    project.script("03_train_grpo.sh", *SHORT, MAX_STEPS="2")
    return project.root / "outputs" / "grpo_final_model"


def weights(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "adapter_model.safetensors")


def same(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return some.keys() == others.keys() and all((some[name] == others[name]).all() for name in some)


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
    project.script("01_sft_end_to_end.sh", MAX_STEPS="2", OUTPUT="outputs/end_to_end")
    assert same(weights(project.root / "outputs" / "end_to_end"), weights(trained))


def test_prompts_are_those_of_the_subset_in_the_contract_of_the_adapter(prompts: Path, trained: Path) -> None:
    manifest = json.loads((prompts / "manifest.json").read_text())
    assert (manifest["method"], manifest["rows_kept"]) == ("grpo", ROWS)
    assert (manifest["source"]["spec"], manifest["source"]["subset"]) == (DAPO, "en")
    assert (prompts / "prompt.json").read_bytes() == (trained / "prompt.json").read_bytes()
    row = open_prepared(prompts).rows.prompt(0)
    assert (row.answer, row.columns["data_source"]) == (next(arithmetic("train", 1))["expected_answer"], "math_dapo")


def test_stage_2_goes_on_from_the_adapter_of_stage_1(improved: Path, trained: Path) -> None:
    assert json.loads((improved / "job.json").read_text())["model"]["adapter"] == str(trained)
    config = json.loads((improved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "unsloth/Qwen3-4B-Base"
    assert (improved / "prompt.json").read_bytes() == (trained / "prompt.json").read_bytes()
    assert weights(improved).keys() == weights(trained).keys()
    assert not same(weights(improved), weights(trained))


def test_every_completion_of_stage_2_is_kept_with_its_scores(improved: Path) -> None:
    for step in (1, 2):
        rollouts = pq.read_table(improved / "rollouts" / f"step_{step}.parquet").to_pylist()
        assert len(rollouts) == 64
        assert {row["row_id"] for row in rollouts} <= set(range(ROWS))
        assert len({row["reward_math_answer"] for row in rollouts}) > 1
        assert any("<SOLUTION>" in row["completion"] for row in rollouts)


def test_a_finished_stage_2_says_so(project: Project, improved: Path) -> None:
    before = weights(improved)
    assert "already prepared" in project.script("02_prepare_grpo_dataset.sh").stderr
    again = project.script("03_train_grpo.sh", *SHORT, MAX_STEPS="2")
    assert "finished" in again.stdout + again.stderr
    assert same(weights(improved), before)


def test_end_to_end_of_stage_2_gives_the_adapter_of_the_two_scripts(project: Project, improved: Path) -> None:
    environment = {"GRPO_SAMPLES": str(ROWS), "MAX_STEPS": "2", "OUTPUT": "outputs/grpo_end_to_end"}
    project.script("02_grpo_end_to_end.sh", *SHORT, **environment)
    assert same(weights(project.root / "outputs" / "grpo_end_to_end"), weights(improved))


def test_stage_2_takes_another_data_set_and_adapter(project: Project, trained: Path) -> None:
    options = ("--subset", "main", "--dry-run")
    environment = {"GRPO_DATASET": "openai/gsm8k", "SFT_MODEL": "outputs/end_to_end"}
    shutil.copytree(trained, project.root / "outputs" / "end_to_end", dirs_exist_ok=True)
    for script in ("02_prepare_grpo_dataset.sh", "02_grpo_end_to_end.sh"):
        shown = project.script(script, *options, **environment).stdout
        assert "openai/gsm8k" in shown
        assert "outputs/end_to_end" in shown


def test_stage_2_without_stage_1_says_what_is_missing(project: Project) -> None:
    run = project.script("02_prepare_grpo_dataset.sh", check=False, SFT_MODEL="outputs/not_there")
    assert run.returncode == 2
    assert "outputs/not_there" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_readmes_scripts_and_programs_exist() -> None:
    known = {"pip", "python3", "os-data", "os-sft", "os-grpo", "os-train", "os-eval", "tensorboard"}
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
    looks = any(word in command for word in ("os-data show", "--dry-run", "--list-rewards"))
    return command if looks else f"{command.rstrip()} --dry-run"


@pytest.mark.parametrize("command", sorted({dry(c) for c in commands(README) if c.startswith("os-")}))
def test_a_command_of_the_readme_runs(command: str, project: Project, improved: Path) -> None:
    words = shlex.split(command)
    before = sorted(p for p in project.root.rglob("*") if "cache" not in p.parts)
    run = subprocess.run(words, cwd=project.root, env=project.env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    after = sorted(p for p in project.root.rglob("*") if "cache" not in p.parts)
    assert [p for p in after if p not in before] in ([], [project.root / "data" / "sft_openmath.html"])


def test_the_readmes_inference_program_uses_the_contracts_prompt(project: Project, improved: Path) -> None:
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
