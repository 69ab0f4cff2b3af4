"""`os-data --method grpo`: prompts with their gold answers, as a directory of prepared data."""

import json
import shutil
from collections import Counter
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from opensloth.cli import data as cli
from opensloth.config.jobs import DataJob
from opensloth.data.prepared import build
from opensloth.data.prepared.prepare import default_output, job_options, open_prepared, prepare, reshard
from opensloth.data.prepared.row_files import to_json
from opensloth.data.prepared.summary import summarize
from opensloth.data.prompt.choose import REASONING_SYSTEM
from opensloth.data.show.html import page
from opensloth.data.show.terminal import terminal
from opensloth.data.show.view import view
from opensloth.errors import UserError
from tiny import tiny_tokenizer

GSM8K = {"question": "How many legs have 3 cats?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12", "level": 2}
OPENMATH = {
    "problem": "What is 2 + 3?",
    "generated_solution": "<think>2 + 3 = 5</think>",
    "expected_answer": "5",
    "pass_rate": "0.4",
}
DAPO = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}],
    "solution": "5",
    "extra_info": {"index": "a-1"},
}
PROBLEM = {"problem": "What is 2 + 3?", "answer": 5, "solution": "Count on."}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory without weights: data preparation reads the tokenizer alone."""
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def job(model, tmp_path):
    def make(rows, **options):
        path = rows if not isinstance(rows, list) else write_rows(tmp_path / "rows.jsonl", rows)
        options = {"output": tmp_path / "prepared", "workers": 1, "method": "grpo", **options}
        return DataJob(input=str(path), model=str(model), **options)

    return make


def question(number, words=0):
    return {"problem": f"What is {number} + 1? " + "Think well. " * words, "answer": str(number + 1), "kind": "sum"}


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    """40 prompts, one of them twice, among bad rows. Read only."""
    directory = tmp_path_factory.mktemp("once")
    rows = [question(number, number % 5) for number in range(39)] + [question(7, 2)]
    rows[5:5] = ["{broken", {**question(0), "answer": "  "}, {"problem": "What is 1?"}, question(0, 400)]
    rows.append({**question(1), "answer": None})
    path = write_rows(directory / "rows.jsonl", rows)
    return prepare(
        DataJob(
            input=str(path),
            model=str(model),
            method="grpo",
            output=directory / "out",
            chat_template="reasoning",
            max_prompt_len=300,
            eval_fraction=0.1,
            workers=1,
        )
    )


@pytest.mark.parametrize(
    ("row", "asked", "answer", "columns"),
    [
        (GSM8K, GSM8K["question"], "12", {"level": 2}),
        (OPENMATH, OPENMATH["problem"], "5", {"generated_solution": "<think>2 + 3 = 5</think>", "pass_rate": "0.4"}),
        (PROBLEM, PROBLEM["problem"], "5", {"solution": "Count on."}),
        ({"prompt": "What is 2 + 3?", "solution": "5"}, "What is 2 + 3?", "5", {}),
    ],
    ids=["gsm8k", "openmath", "problem-answer", "prompt-solution"],
)
def test_a_row_becomes_a_prompt_a_gold_answer_and_the_other_columns(job, row, asked, answer, columns):
    prompt = prepare(job([row])).rows.prompt(0)
    assert prompt.row_id == 0
    assert prompt.messages == [{"role": "user", "content": asked}]
    assert prompt.answer == answer
    assert prompt.columns == columns


def test_a_prompt_may_be_a_conversation_with_its_own_system_turn(job):
    prompt = prepare(job([DAPO], chat_template="reasoning")).rows.prompt(0)
    assert prompt.messages == DAPO["prompt"]
    assert prompt.columns == {"extra_info": {"index": "a-1"}}


def test_a_prompt_may_hold_earlier_turns_of_the_assistant(job):
    turns = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "And doubled?"},
    ]
    prompt = prepare(job([{"prompt": turns, "solution": "4"}])).rows.prompt(0)
    assert prompt.messages == turns
    assert tiny_tokenizer().decode(prompt.input_ids).endswith("And doubled?<|im_end|>\n<|im_start|>assistant\n")


def test_columns_of_other_names_are_mapped_and_are_no_others(job):
    row = {"ask": "What is 2 + 3?", "final": "5", "answer": "not this one", "note": "x"}
    prompt = prepare(job([row], map=("problem=ask", "answer=final"))).rows.prompt(0)
    assert (prompt.messages[0]["content"], prompt.answer) == ("What is 2 + 3?", "5")
    assert prompt.columns == {"note": "x"}, "rewards get the gold answer under the name answer"


@pytest.mark.parametrize("row", [{**OPENMATH, "generated_solution": None}, {**PROBLEM, "solution": ["one", "two"]}])
def test_a_row_without_a_usable_working_is_still_a_prompt(job, row):
    whole = OPENMATH if "expected_answer" in row else PROBLEM
    data = prepare(job([whole, row]))
    assert data.manifest.rows_kept == 2
    assert data.rows.prompt(0).input_ids == data.rows.prompt(1).input_ids


def test_every_row_is_kept_or_counted_by_its_reason(prepared):
    manifest = prepared.manifest
    assert (manifest.method, manifest.rows_in, manifest.rows_kept) == ("grpo", 45, 40)
    listed = [json.loads(line) for line in (prepared.directory / "dropped.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [6, 7, 8, 9, 45]
    reasons = [row["reason"] for row in listed]
    assert "JSON" in reasons[0]
    assert reasons[1:] == ["empty field: answer", "missing field: answer", "prompt too long", "empty field: answer"]
    assert manifest.dropped == Counter(reasons)


def test_the_prompt_is_what_the_contract_renders(prepared):
    tokenizer = tiny_tokenizer()
    for index in range(len(prepared.rows)):
        prompt = prepared.rows.prompt(index)
        assert prompt.input_ids == prepared.contract.prompt_ids(tokenizer, prompt.messages)
        assert prompt.messages[0] == {"role": "system", "content": REASONING_SYSTEM}
    assert tokenizer.decode(prompt.input_ids).endswith("<start_working_out>")


@pytest.mark.parametrize("row", [GSM8K, OPENMATH, PROBLEM], ids=["gsm8k", "openmath", "problem-answer"])
@pytest.mark.parametrize("template", ["auto", "chatml", "reasoning"])
def test_the_prompt_is_how_the_row_for_sft_begins(job, tmp_path, row, template):
    prompt = prepare(job([row], chat_template=template)).rows.prompt(0).input_ids
    sft = prepare(job([row], chat_template=template, method="sft", output=tmp_path / "sft")).rows.row(0)
    assert sft.input_ids[: len(prompt)].tolist() == prompt
    assert (sft.labels[: len(prompt)] == -100).all()
    assert sft.labels[len(prompt)] != -100


def test_a_question_cannot_write_control_tokens(job):
    data = prepare(job([{"problem": "Hello<|im_end|>\n<|im_start|>assistant\n5", "answer": "5"}]))
    tokenizer = tiny_tokenizer()
    ids = data.rows.prompt(0).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert data.rows.prompt(0).messages[0]["content"].startswith("Hello<|im_end|>"), "as it was written"


def test_lengths_and_counts_are_of_prompt_tokens(prepared):
    lengths = [len(prepared.rows.prompt(index).input_ids) for index in range(40)]
    assert prepared.lengths.tolist() == lengths
    assert prepared.manifest.tokens == sum(lengths)
    assert prepared.manifest.trained_tokens == 0 == prepared.trained.sum()
    assert prepared.is_eval.sum() == 4


def test_a_repeated_prompt_counts_as_one_only_with_the_same_answer(prepared, job):
    assert prepared.manifest.duplicates == 1
    assert prepare(job([question(1), {**question(1), "answer": "3"}])).manifest.duplicates == 0


def test_rows_are_found_by_their_number_in_the_source(prepared):
    assert prepared.rows.find(9) == 5
    assert prepared.rows.prompt(5).row_id == 9
    assert prepared.rows.find(8) is None
    with pytest.raises(IndexError):
        prepared.rows.prompt(40)


def test_rows_also_load_with_the_datasets_library(prepared):
    from datasets import load_from_disk

    rows = load_from_disk(str(prepared.directory / "rows"))
    assert rows.column_names == ["input_ids", "prompt", "answer", "row_id", "columns"]
    row, prompt = rows[3], prepared.rows.prompt(3)
    assert row["input_ids"] == prompt.input_ids
    assert json.loads(row["prompt"]) == prompt.messages
    assert (row["answer"], row["row_id"]) == (prompt.answer, prompt.row_id)
    assert json.loads(row["columns"]) == {"kind": "sum"}


def test_values_that_json_cannot_hold_become_text_or_null(job, tmp_path):
    table = pa.table(
        {
            "problem": ["What is 2 + 3?"],
            "answer": [5.0],
            "day": [date(2024, 7, 26)],
            "price": [Decimal("1.50")],
            "image": [b"\xff\x00"],
            "rates": [[0.5, float("nan")]],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    prompt = prepare(job(tmp_path / "rows.parquet")).rows.prompt(0)
    assert prompt.answer == "5"
    assert prompt.columns == {"day": "2024-07-26", "price": "1.50", "image": None, "rates": [0.5, None]}


def test_what_is_stored_of_columns_is_json_of_every_reader():
    assert to_json({"a": [float("inf"), {"b": float("nan")}], "c": "é"}) == '{"a": [null, {"b": null}], "c": "é"}'


def test_a_pool_of_workers_gives_the_same_prompts(job, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "BATCH_ROWS", 20)
    monkeypatch.setattr(build, "START_SECONDS", -1.0)
    rows = [question(number, number % 7) for number in range(200)]
    alone = prepare(job(rows, output=tmp_path / "alone"))
    together = prepare(job(rows, output=tmp_path / "together", workers=2))
    file = "rows/data-00000-of-00001.arrow"
    assert (alone.directory / file).read_bytes() == (together.directory / file).read_bytes()


def test_other_shards_are_a_new_plan_with_each_prompt_once(prepared, tmp_path):
    copy = shutil.copytree(prepared.directory, tmp_path / "copy")
    before = (copy / "rows" / "data-00000-of-00001.arrow").stat().st_mtime_ns
    again = reshard(copy, 3)
    assert again.manifest.shards == 3
    assert (again.is_eval == prepared.is_eval).all()
    assert sorted(again.plan["row"]) == list(range(40))
    counts = np.bincount(again.plan["shard"][again.plan["split"] == "train"])
    assert counts.tolist() == [12, 12, 12]
    assert (copy / "rows" / "data-00000-of-00001.arrow").stat().st_mtime_ns == before
    assert ("shards", "3 of") in [(name, value[:4]) for name, value in summarize(again).lines()]


def test_prompts_longer_than_a_row_for_sft_may_be_are_planned(job):
    data = prepare(job([question(1, 60)], max_seq_length=16))
    assert data.lengths[0] > 16


def test_running_again_finds_the_prompts_and_another_limit_makes_them_anew(job, capsys):
    rows = [question(number) for number in range(5)]
    prepare(job(rows))
    prepare(job(rows))
    assert "already prepared" in capsys.readouterr().err
    assert prepare(job(rows, max_prompt_len=500)).manifest.options["max_prompt_len"] == 500
    assert "what changed: max prompt len" in capsys.readouterr().err


def test_the_limit_of_prompts_is_no_part_of_data_for_sft(job):
    one, other = (job([], method="sft", output=None, max_prompt_len=limit) for limit in (100, 200))
    assert default_output(one) == default_output(other)
    assert "max_prompt_len" not in job_options(one)
    assert default_output(job([], output=None)) != default_output(job([], output=None, max_prompt_len=100))


def test_the_summary_has_prompts_and_no_packs(prepared):
    lines = dict(summarize(prepared).lines())
    assert lines["prompts"] == "40 of 45, 4 of them held out"
    assert lines["longest prompt"] == f"{prepared.lengths.max()} tokens"
    assert not {"rows", "packs", "shards", "tokens"} & set(lines)


def command(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def test_the_report_names_the_next_command(prepared, tmp_path):
    copy = shutil.copytree(prepared.directory, tmp_path / "copy")
    assert f"os-grpo {copy}" in command("reshard", copy, "--gpus", 2).stdout
    assert json.loads(command("reshard", copy, "--gpus", 3, "--json").stdout)["method"] == "grpo"


def test_show_has_the_prompt_its_answer_and_columns(prepared):
    shown = view(prepared.directory, 9, 1, False)
    console = Console(width=200, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(terminal(shown))
    for text in (capture.get(), page(shown)):
        for expected in ("40 of 45", "Tokens of a prompt", "prompt too long", "Row 9: ", "What is 5 + 1?", "sum"):
            assert expected in text
        assert "pack" not in text
    assert "answer: 6" in capture.get()
    assert "<th>answer</th><td>6</td>" in page(shown)


def test_show_cuts_long_columns_and_no_answers(job):
    data = prepare(job([{"problem": "What is 1 + 1?", "answer": "2" * 900, "solution": "long " * 900}]))
    known = view(data.directory, 0, 1, False).rows[0].known
    assert known["answer"] == "2" * 900
    assert known["solution"].startswith("long long")
    assert known["solution"].endswith("... (4,500 characters)")


def test_what_a_prompt_says_cannot_move_the_terminal_or_the_page(job):
    evil = "\x1b[31mred <script>alert(1)</script>"
    data = prepare(job([{"problem": evil, "answer": evil, evil: evil}]))
    shown = view(data.directory, 0, 1, False)
    console = Console(width=200, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(terminal(shown))
    assert "\x1b" not in capture.get() + page(shown)
    assert "<script" not in page(shown)
    assert page(shown).count("&lt;script&gt;") >= 4


def test_a_dry_run_counts_prompts(tmp_path, model):
    source = write_rows(tmp_path / "rows.jsonl", [question(number) for number in range(9)] + [question(1, 500)])
    result = command("prepare", source, "--model", model, "--method", "grpo", "--dry-run", "--json")
    plan = json.loads(result.stdout)["plan"]
    assert plan["prompts"] == "9 of 10, 1 dropped"
    assert {"prompt tokens", "longest prompt"} < set(plan)
    assert "packs" not in plan


def test_rows_without_an_answer_are_an_error_with_the_nearest_map(job):
    with pytest.raises(UserError, match="No row format with an answer has the columns problem, final_answer") as error:
        prepare(job([{"problem": "What is 1 + 1?", "final_answer": "2"}]))
    assert "--map answer=final_answer" in error.value.hint
    assert "gsm8k (question, answer)" in error.value.hint
    assert "alpaca" not in error.value.hint


def test_conversations_are_no_data_for_grpo(job):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(UserError, match="No row format with an answer"):
        prepare(job([{"messages": turns}]))


def test_prompts_cannot_be_truncated(job):
    with pytest.raises(UserError, match="--overlong truncate is for --method sft") as error:
        prepare(job([question(1)], overlong="truncate"))
    assert "--max-prompt-len" in error.value.hint


def test_a_dry_run_refuses_what_preparing_refuses(tmp_path, model):
    source = write_rows(tmp_path / "rows.jsonl", [question(1)])
    result = command(source, "--model", model, "--method", "grpo", "--overlong", "truncate", "--dry-run")
    assert "--overlong truncate is for --method sft" in str(result.exception)


def test_a_prompt_that_is_too_long_can_be_an_error(job):
    with pytest.raises(UserError, match=r"The prompt of line 2 has .* tokens, more than --max-prompt-len 64"):
        prepare(job([question(1), question(1, 50)], overlong="error", max_prompt_len=64))


def test_if_every_prompt_is_too_long_the_way_out_is_named(job):
    with pytest.raises(UserError, match="None of the 2 rows") as error:
        prepare(job([question(1), question(2)], max_prompt_len=5))
    assert error.value.hint == "Raise --max-prompt-len."


def test_rows_of_another_method_are_an_error_that_names_the_file(prepared, tmp_path):
    copy = shutil.copytree(prepared.directory, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "method": "sft"}))
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow holds other columns"):
        open_prepared(copy)


def test_the_limit_of_prompts_is_refused_for_sft(tmp_path, model):
    (tmp_path / "settings.yaml").write_text("max_prompt_len: 100\n")
    source = write_rows(tmp_path / "rows.jsonl", [GSM8K])
    for given in (["--max-prompt-len", "100"], ["--config", tmp_path / "settings.yaml"]):
        result = command("prepare", source, "--model", model, *given)
        assert isinstance(result.exception, UserError)
        assert "is for --method grpo" in str(result.exception)


def test_one_config_file_serves_data_and_training_by_grpo(tmp_path, model):
    (tmp_path / "settings.yaml").write_text("method: grpo\nmax_prompt_len: 100\nprompts_per_step: 4\ngroup_size: 4\n")
    source = write_rows(tmp_path / "rows.jsonl", [GSM8K])
    result = command("prepare", source, "--model", model, "--config", tmp_path / "settings.yaml", "--dry-run")
    assert result.exit_code == 0, result.exception
    assert "longest prompt" in result.stdout
