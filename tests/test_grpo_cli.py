"""os-grpo and os-train grpo before the first completion: what they refuse, what they say, what they write down."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from opensloth.cli import data, grpo, program, train
from opensloth.cli.grpo_checks import check_context, model_figures
from opensloth.config.base import resolve
from opensloth.config.jobs import GrpoJob
from opensloth.data.models.resolve import ModelRef
from opensloth.data.prompt.choose import contract_for
from opensloth.data.tokens.stop import stop_ids
from opensloth.errors import UserError
from opensloth.launch import run_directory
from opensloth.rewards.choose import chosen, content
from tiny import save_tiny_model, tiny_tokenizer

ROWS = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(20)]
SMALL = ("--prompts-per-step", 4, "--group-size", 2, "--max-new", 8)
REWARD = "def {name}(prompts, completions, {column}, **others):\n    return [{value}] * len(completions)\n"


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and what os-data makes of them: `d` with tags, `plain` without, `sft` for the other method."""
    directory = tmp_path_factory.mktemp("grpo")
    save_tiny_model(directory / "model")
    write(directory / "rows.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        shared = ["--model", "model", "--workers", "1"]
        grpo_data = ["rows.jsonl", *shared, "--method", "grpo"]
        assert program.run(data.app, [*grpo_data, "--chat-template", "reasoning", "--output", "d"]) == 0
        assert program.run(data.app, [*grpo_data, "--output", "plain"]) == 0
        turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]
        write(directory / "turns.jsonl", [{"messages": turns}] * 4)
        assert program.run(data.app, ["turns.jsonl", *shared, "--output", "sft"]) == 0
    return directory


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A directory of this test's own, in which the paths of `place` are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for path in place.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """The run directories for which workers would have been started."""
    found = []
    monkeypatch.setattr(
        run_directory,
        "run_workers",
        lambda world, run_dir, **_: (
            found.append(Path(run_dir)),
            (Path(run_dir) / "result.json").write_text('{"steps": 1}'),
        ),
    )
    return found


@pytest.fixture
def call(here, capsys, started):
    def run(app, *arguments):
        code = program.run(app, [str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def refused(code: int, out: str, err: str) -> str:
    """The one line and its hint."""
    lines = err.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("error:")]
    assert (code, out) == (2, ""), err
    assert len(lines[first:]) <= 2, err
    return "\n".join(lines[first:])


# --list-rewards


def test_the_rewards_and_presets_are_listed_without_any_data(call):
    code, out, err = call(grpo.app, "--list-rewards")
    assert (code, err) == (0, "")
    for word in ("math_format", "math_answer", "math_number", "demo_reward", "FILE.py:FUNCTION"):
        assert f"\n  {word} " in out
    assert out.split("tasks\n")[1].split()[0] == "math"


# bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "maths"), ("There is no task 'maths'", "Did you mean math?")),
        (("--rewards", "own.py"), ("The reward own.py names no function", "Write own.py:FUNCTION")),
        (("--rewards", "math_anser"), ("There is no reward 'math_anser'", "Did you mean math_answer?")),
        (("--rewards", "nowhere.py:f"), ("nowhere.py does not exist",)),
        (("--rewards", "math_answer=much"), ("weight",)),
        (("--group-size", 1), ("--group-size 1", "at least 2")),
        (("--prompts-per-step", 21), ("20 prompts", "--prompts-per-step 21")),
        (("--processes", 3), ("8 over 3 processes is 2.667 each", "6 or 9")),
        (("--batch-size", 4, "--grad-accum", 3), ("4 x --grad-accum 3 x 1 processes = 12", "8 x --group-size 8 = 64")),
        (("--max-new", 4090), ("+ --max-new 4,090 =", "context is 4,096", "Lower --max-new to")),
        (("--stop", "two words"), ("--stop 'two words' is", "tokens")),
        (("--model", "nothing/at/all"), ("nothing/at/all",)),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_mistake_is_one_line_before_anything_is_written(call, here, started, arguments, says, dry):
    processes = () if "--processes" in arguments else ("--processes", 1)
    said = refused(*call(grpo.app, "d", *processes, *arguments, *dry))
    assert all(word in said for word in says), said
    assert not started
    assert not (here / "outputs").exists()


def test_an_option_of_os_data_is_sent_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["os-grpo", "dir", "--max_prompt_len", "5"])
    monkeypatch.setattr(grpo, "leave", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        grpo.main()
    assert "os-data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"), [((), "--task math"), (("--rewards", "math_number"), "The reward math_number")]
)
def test_rewards_that_read_tags_need_prompts_that_ask_for_them(call, arguments, named):
    said = refused(*call(grpo.app, "plain", "--processes", 1, *arguments))
    assert named in said
    assert "--chat-template reasoning" in said
    one = refused(*call(train.app, "grpo", "rows.jsonl", "--model", "model", "--processes", 1, "--dry-run", *arguments))
    assert one == said


def test_prompts_without_tags_are_refused_before_any_row_is_prepared(call, here):
    said = refused(*call(train.app, "grpo", "rows.jsonl", "--model", "model", "--processes", 1, *SMALL))
    assert "the data's prompts ask for none" in said
    assert not (here / "outputs").exists()
    assert not list((here / "data").glob("*"))


def test_data_for_sft_is_sent_to_os_sft(call):
    said = refused(*call(grpo.app, "sft", "--processes", 1))
    assert "was prepared with --method sft, not --method grpo" in said
    assert "os-sft" in said


def test_a_config_file_that_contradicts_the_data_names_both(call, here):
    (here / "job.yaml").write_text("max_prompt_len: 99\nmax_new: 8\n")
    said = refused(*call(grpo.app, "d", "--config", "job.yaml", "--processes", 1))
    assert "max_prompt_len 99" in said
    assert "max_prompt_len 1024" in said


def test_a_column_that_a_reward_needs_and_the_data_lacks_is_found_before_training(call, here, started):
    (here / "own.py").write_text(REWARD.format(name="own", column="difficulty", value=1))
    said = refused(*call(grpo.app, "d", "--processes", 1, "--rewards", "own.py:own"))
    assert "own.py, line 1) needs the column 'difficulty'" in said
    assert "level" in said
    (here / "own.py").write_text(REWARD.format(name="own", column="level", value=1))
    code, _, err = call(grpo.app, "d", "--processes", 1, "--rewards", "own.py:own", *SMALL)
    assert code == 0, err
    assert len(started) == 1


def test_a_file_of_rewards_that_does_not_run_names_its_line(call, here):
    (here / "own.py").write_text("import json\njson.nothing\n")
    said = refused(*call(grpo.app, "d", "--processes", 1, "--rewards", "own.py:own"))
    assert "own.py, line 2: AttributeError" in said


def test_the_one_command_finds_wrong_rewards_and_batches_before_it_prepares_data(call, here):
    for arguments in (("--task", "maths"), ("--rewards", "nowhere.py:f"), ("--processes", 3)):
        processes = () if "--processes" in arguments else ("--processes", 1)
        refused(*call(train.app, "grpo", "rows.jsonl", "--model", "model", *processes, *arguments))
        assert not (here / "data").exists()


def test_the_context_is_the_longest_prompt_and_the_completion():
    job = resolve(GrpoJob, {"data": "d", "max_new": 100}).job
    assert check_context(job, 156, 256) == "longest prompt 156 + --max-new 100 = 256 tokens, of 256"
    with pytest.raises(UserError, match=r"157 \+ --max-new 100 = 257 tokens, and the model's context is 256") as caught:
        check_context(job, 157, 256)
    assert "--max-new to 99" in caught.value.hint
    with pytest.raises(UserError) as caught:
        check_context(job, 300, 256)
    assert caught.value.hint.startswith("Prepare the data with a smaller --max-prompt-len")


def test_stop_tokens_are_the_contracts_and_single_tokens_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    contract = contract_for(tokenizer, "chatml")
    own = [tokenizer.convert_tokens_to_ids(text) for text in contract.stop]
    assert stop_ids(tokenizer, contract) == own
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    assert stop_ids(tokenizer, contract, ("\n", contract.stop[0])) == [*own, *newline]
    with pytest.raises(UserError, match=r"--stop 'Natalia  sold' is \d+ tokens"):
        stop_ids(tokenizer, contract, ("Natalia  sold",))


# gold answers


def prepared_with(here: Path, call, answers: list[str]) -> None:
    write(here / "gold.jsonl", [{"problem": f"Problem {n}?", "answer": answer} for n, answer in enumerate(answers)])
    command = ("gold.jsonl", "--model", "model", "--method", "grpo", "--chat-template", "reasoning", "--workers", 1)
    assert call(data.app, *command, "--output", "gold", "--force")[0] == 0


MISREAD = "17 </SOLUTION> 18"


def test_rows_whose_gold_answer_the_rewards_misjudge_are_listed_and_named(call, here, started):
    prepared_with(here, call, ["1", MISREAD, "3", "4", "5", MISREAD])
    code, _, err = call(grpo.app, "gold", "--processes", 1, *SMALL)
    assert code == 0, err
    (run,) = started
    lines = [json.loads(line) for line in (run / "gold_failures.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == [1, 5]
    assert {line["answer"] for line in lines} == {MISREAD}
    assert all("its own answer" in line["reason"] for line in lines)
    assert "2 of 6 rows have a gold answer that the rewards misjudge" in err
    assert "(rows 1, 5)" in err


def test_a_run_whose_answers_are_all_well_has_an_empty_list(call, started):
    code, _, err = call(grpo.app, "d", "--processes", 1, *SMALL)
    assert code == 0, err
    assert (started[0] / "gold_failures.jsonl").read_text() == ""
    assert "warning" not in err


def test_answers_that_are_all_misjudged_or_too_few_good_ones_stop_the_run(call, here, started):
    prepared_with(here, call, [MISREAD] * 5)
    said = refused(*call(grpo.app, "gold", "--processes", 1, *SMALL))
    assert "none of the 5 gold answers" in said
    assert "--map answer=COLUMN" in said
    prepared_with(here, call, ["1", "2", MISREAD, MISREAD, "5"])
    assert "--prompts-per-step 4" in refused(*call(grpo.app, "gold", "--processes", 1, *SMALL))
    assert not started
    assert not list(Path("outputs").glob("*/job.json"))


# the job


def test_a_dry_run_shows_the_batch_the_rewards_the_context_and_the_reference(call, here):
    before = sorted(path.name for path in here.iterdir())
    command = ("d", "--processes", 2, "--beta", 0.1, "--rewards", "math_answer,math_format=0.5", "--max-new", 64)
    code, out, err = call(grpo.app, *command, "--dry-run", "--json")
    assert code == 0, err
    record = json.loads(out)
    plan = record["plan"]
    assert plan["a batch"] == "8 prompts x 8 completions = 64 completions, 32 on each of 2 processes"
    assert plan["steps"] == "3, 1.2 epochs of 20 prompts"
    assert plan["rewards"] == "math_answer, math_format x 0.5"
    assert plan["context"].endswith("of 4,096")
    assert plan["adapter"] == "new: r 16, alpha 32"
    assert plan["reference"].startswith("the KL divergence is measured from the base model")
    assert "GiB" in plan["memory"]
    assert record["job"]["model"]["origin"] == "data"
    code, out, _ = call(grpo.app, *command, "--dry-run")
    assert code == 0
    assert "Nothing was written" in out
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_dry_run_knows_the_layers_of_the_model(call):
    said = refused(*call(grpo.app, "d", "--processes", 1, "--lora-targets", "q_proj,w_proj", "--dry-run"))
    assert "The model has no layer w_proj (--lora-targets)." in said


def test_a_dry_run_of_the_one_command_estimates_the_same(call, here):
    command = (
        "rows.jsonl",
        "--model",
        "model",
        "--chat-template",
        "reasoning",
        "--processes",
        1,
        "--updates-per-batch",
        5,
    )
    code, out, err = call(train.app, "grpo", *command, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)["plan"]
    assert plan["steps"].startswith("about 15,")
    assert plan["a batch"].endswith("64 completions; 5 optimizer steps on each batch")
    assert plan["reference"] == "none (--beta 0)"
    assert Path(plan["prepared data"]).name.startswith("grpo-rows-")
    few = refused(*call(train.app, "grpo", *command, "--prompts-per-step", 100_000, "--dry-run"))
    assert "prompts to train on, fewer than --prompts-per-step 100000." in few
    unsloth = refused(*call(train.app, "grpo", *command, "--engine", "unsloth", "--dry-run"))
    assert "--engine unsloth needs a CUDA card." in unsloth
    assert not (here / "data").exists()


def test_the_reference_is_what_training_starts_from(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 24}')
    job = resolve(GrpoJob, {"data": "d", "beta": 0.1}).job
    adapted = model_figures(job, ModelRef("a", "base", None, tmp_path, "a"))
    assert adapted["adapter"].endswith("r 8, alpha 24")
    told = model_figures(job.model_copy(update={"lora_r": 64}), ModelRef("a", "base", None, tmp_path, "a"))
    assert told["adapter"].endswith("r 8, alpha 24; --lora-r 64 is not used")
    assert "that adapter as it is now, frozen" in adapted["reference"]
    whole = model_figures(job.model_copy(update={"full_finetuning": True}), ModelRef("b", "base", None, None, "b"))
    assert "a frozen copy of base" in whole["reference"]


def test_the_job_says_its_method_and_what_was_settled(call, started):
    code, out, err = call(grpo.app, "d", "--processes", 1, *SMALL, "--json")
    assert code == 0, err
    assert json.loads(out)["status"] == "trained"
    (run,) = started
    assert run.name.startswith("grpo-model-rows-")
    record = json.loads((run / "job.json").read_text())
    assert record["method"] == "grpo"
    assert record["identity"]["rewards"] == "math_format=1, math_answer=1, math_number=1, demo_reward=1"
    assert record["settings"]["prompts_per_step"] == {"value": 4, "origin": "flag"}
    assert "rewards: math_format, math_answer, math_number, demo_reward" in err
    assert "reference: none (--beta 0)" in err
    code, out, err = call(grpo.app, "d", "--processes", 1, *SMALL)
    assert "already finished" in out
    assert err == ""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("--print-samples-every", 3), True),
        (("--zero-signal", "stop"), True),
        (("--batch-size", 4), True),
        (("--rewards", "math_format,math_answer,math_number,demo_reward"), True),
        (("--rewards", "math_format,math_answer=2,math_number,demo_reward"), False),
        (("--rollout", "generate"), False),
        (("--beta", 0.1), False),
        (("--group-size", 4), False),
    ],
)
def test_what_changes_the_model_is_another_job(call, started, change, same):
    assert call(grpo.app, "d", "--processes", 1, *SMALL, "--output", "run")[0] == 0
    code, out, err = call(grpo.app, "d", "--processes", 1, *SMALL, "--output", "run", *change)
    assert code == (0 if same else 2), err
    assert ("already finished" in out) is same
    if not same:
        assert "holds another job" in err


def test_a_file_of_rewards_is_known_by_its_text(tmp_path):
    def identity(path: Path) -> str:
        job = resolve(GrpoJob, {"data": "d", "rewards": f"math_format, {path}:own = 2"}).job
        return content(job, chosen(job, contract_for(tiny_tokenizer(), "reasoning").tags))

    one, moved = tmp_path / "one.py", tmp_path / "moved.py"
    one.write_text(REWARD.format(name="own", column="level", value=1))
    shutil.copy(one, moved)
    first = identity(one)
    assert first == identity(moved)
    assert first.startswith("math_format=1, own=2 (file ")
    one.write_text(REWARD.format(name="own", column="level", value=2))
    assert identity(one) != first


def test_the_gold_answers_are_checked_once_in_a_runs_life(call, started, monkeypatch):
    from opensloth.cli import grpo_checks

    assert call(grpo.app, "d", "--processes", 1, *SMALL, "--output", "run")[0] == 0
    Path("run/result.json").unlink()
    monkeypatch.setattr(grpo_checks, "gold_check", None)
    code, _, err = call(grpo.app, "d", "--processes", 1, *SMALL, "--output", "run")
    assert code == 0, err
    assert len(started) == 2
