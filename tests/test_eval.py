"""os-eval: what is right, how sure that is, and a comparison of models end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensloth.data.prompt.choose import contract_for
from opensloth.evaluation.generate import Completion
from opensloth.evaluation.score import judge, paired_difference, pass_at, share
from tiny import save_tiny_model, tiny_model, tiny_tokenizer

RIGHT = "2 + 3 = 5.<end_working_out><SOLUTION>5</SOLUTION>"


@pytest.fixture(scope="module")
def contract():
    return contract_for(tiny_tokenizer(), "reasoning")


@pytest.mark.parametrize(
    ("text", "answer", "in_format", "right"),
    [
        (RIGHT, "5", True, True),
        (RIGHT, "6", True, False),
        (RIGHT.replace("5</S", " 1,005 </S"), "1005", True, True),
        (RIGHT.replace("5</S", r"\frac{10}{2}</S"), "5", True, True),
        (RIGHT.replace("5</S", "5 or 6</S"), "5", True, False),
        (RIGHT + " So it is 5.", "5", False, False),
        ("<SOLUTION>5</SOLUTION>", "5", False, False),
        ("5", "5", False, False),
    ],
)
def test_an_answer_is_right_in_the_format_alone(contract, text, answer, in_format, right):
    judged = judge(contract, Completion(text, 9), answer)
    assert (judged.in_format, judged.right) == (in_format, right)


def test_a_contract_without_tags_has_nothing_to_judge():
    with pytest.raises(ValueError, match="no tags"):
        judge(contract_for(tiny_tokenizer(), "chatml"), Completion(RIGHT, 9), "5")


def test_the_interval_is_wilsons():
    found = share([True] * 81 + [False] * 182)  # 81 of 263: Newcombe (1998), table I
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert share([False] * 10).low == 0.0
    assert share([True] * 10).high == pytest.approx(1.0)
    assert share([True] * 10).low < 1.0


def test_a_paired_difference_knows_which_problems_changed():
    first = [True] * 50 + [False] * 50
    assert paired_difference(first, first).value == 0
    better = [True] * 60 + [False] * 40
    found = paired_difference(first, better)
    assert found.value == pytest.approx(0.10)
    assert found.low > 0
    swapped = [False] * 50 + [True] * 50  # the same share, by other problems: nothing is sure
    wide = paired_difference(first, swapped)
    assert wide.value == 0
    assert wide.high > found.high


def test_pass_at_k_is_the_chance_that_one_of_k_is_right():
    assert pass_at(1, [[True, False, False, False]]) == pytest.approx(0.25)
    assert pass_at(2, [[True, False, False, False]]) == pytest.approx(1 - math.comb(3, 2) / math.comb(4, 2))
    assert pass_at(4, [[True, False, False, False], [False] * 4]) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval") / "model"
    save_tiny_model(directory)
    return directory


def os_eval(*words, cwd: Path):
    command = [sys.executable, "-m", "opensloth.cli.eval", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_models_are_compared_on_the_same_problems(model, tmp_path):
    options = ("--chat-template", "reasoning", "-n", 4, "--max-new", 6, "--group-size", 2, "--json")
    run = os_eval("sample:arithmetic", "--model", model, "--model", model, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["problems"] == 4
    first, second = found["models"]
    assert first["difference"] is None
    assert second["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}  # greedy: the same model, the same answers
    assert first["pass_at_1"]["value"] == 0.0
    assert 0 < first["pass_at_1"]["high"] < 1
    assert first["pass_at_k"] == 0.0
    assert 1 <= first["mean_tokens"] <= 6


def test_what_cannot_be_judged_is_one_line(model, tmp_path):
    run = os_eval("sample:arithmetic", "--model", model, "-n", 2, cwd=tmp_path)
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if line.startswith("error:")] == [
        "error: --task math finds answers between tags, and the prompts of model ask for none."
    ]


def test_a_dry_run_finds_what_the_run_would(model, tmp_path):
    missing = os_eval("sample:arithmetic", "--model", "outputs/nope", "-n", 2, "--dry-run", cwd=tmp_path)
    assert missing.returncode == 2
    tags = os_eval("sample:arithmetic", "--model", model, "-n", 2, "--dry-run", cwd=tmp_path)
    assert "the prompts of model ask for none" in tags.stderr


def test_answers_that_may_be_longer_than_the_context_are_refused(model, tmp_path):
    options = ("--chat-template", "reasoning", "-n", 2, "--max-new", 4096)
    refused = os_eval("sample:arithmetic", "--model", model, *options, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--max-new 4,096 leaves no room for a problem in the 4,096 positions of model." in refused.stderr


def test_an_input_without_answers_says_why(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "What is 1 + 2?", "answer": "3"}\n' * 3)
    refused = os_eval("rows.jsonl", "--model", model, cwd=tmp_path)
    assert refused.returncode == 2
    assert "3 x no #### before the final answer" in refused.stderr
    assert "--map problem=question" in refused.stderr


def test_a_model_that_is_broken_is_one_line(tmp_path):
    """Its weights are not numbers, and so is what it says of the next token."""
    broken = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        broken.lm_head.weight[:] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    options = ("--chat-template", "reasoning", "-n", 2, "--max-new", 2)
    run = os_eval("sample:arithmetic", "--model", "broken", *options, cwd=tmp_path)
    assert run.returncode == 3, run.stderr
    assert "error: broken cannot be scored: the model's logits are not finite" in run.stderr
    assert "Traceback" not in run.stderr


def test_wrong_answers_are_shown(model, tmp_path):
    options = ("--chat-template", "reasoning", "-n", 2, "--max-new", 4, "--show-wrong", 1)
    run = os_eval("sample:arithmetic", "--model", model, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "right answers, greedy" in run.stdout
    assert run.stdout.count("expected") == 1
