"""`os-data`: source rows to a directory of prepared data, and back."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from opensloth.config.jobs import DataJob
from opensloth.data.messages.examples import NO_MARK, detect_format
from opensloth.data.models.resolve import resolve_model
from opensloth.data.prepared import build
from opensloth.data.prepared.prepare import Tally, default_output, open_prepared, prepare, reshard, way_out
from opensloth.data.prepared.summary import summarize
from opensloth.data.prompt.choose import contract_for
from opensloth.data.prompt.contract import NO_WORKING
from opensloth.data.sources.open import open_source
from opensloth.errors import UserError, WorkerFailed
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory without weights: data preparation reads the tokenizer alone."""
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def conversation(number, words=3):
    asked = {"role": "user", "content": f"What is {number} + 1? " + "Think well. " * (number % words)}
    return {"messages": [asked, {"role": "assistant", "content": f"It is {number + 1}."}]}


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def job(model, tmp_path):
    def make(rows=None, **options):
        if rows is not None:
            write_rows(tmp_path / "rows.jsonl", rows)
        options = {"output": tmp_path / "prepared", "workers": 1, **options}
        return DataJob(input=str(tmp_path / "rows.jsonl"), model=str(model), **options)

    return make


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    """120 good rows, one of them twice, among three bad ones, on three shards. Tests that change it copy it."""
    directory = tmp_path_factory.mktemp("once")
    rows = [conversation(number) for number in range(119)] + [conversation(7)]
    rows[10:10] = ["{broken", {"messages": []}, "[1, 2]"]
    path = write_rows(directory / "rows.jsonl", rows)
    job = DataJob(input=str(path), model=str(model), output=directory / "out", gpus=3, workers=1, eval_fraction=0.1)
    return prepare(job)


@pytest.fixture
def copy(prepared, tmp_path):
    import shutil

    return Path(shutil.copytree(prepared.directory, tmp_path / "copy"))


def test_every_row_is_kept_or_counted_as_dropped(prepared):
    manifest = prepared.manifest
    assert manifest.rows_in == 123
    assert manifest.rows_kept == 120 == len(prepared.rows)
    assert manifest.rows_in == manifest.rows_kept + sum(manifest.dropped.values())


def test_dropped_rows_are_listed_with_line_and_reason(prepared):
    dropped = [json.loads(line) for line in (prepared.directory / "dropped.jsonl").read_text().splitlines()]
    assert [row["line"] for row in dropped] == [11, 12, 13]
    assert all(prepared.manifest.dropped[row["reason"]] for row in dropped)


def test_repeated_rows_are_kept_and_counted(prepared):
    assert prepared.manifest.duplicates == 1


def test_rows_lie_in_the_source_s_order_with_their_numbers(prepared):
    ids = [prepared.rows.row(index).row_id for index in range(len(prepared.rows))]
    assert ids == [*range(10), *range(13, 123)]
    assert prepared.rows.find(13) == 10
    assert prepared.rows.find(11) is None


def test_a_stored_row_is_the_rendered_conversation_with_its_mask(prepared):
    row = prepared.rows.row(5)
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(conversation(5)["messages"], tokenize=False)
    assert tokenizer.decode(row.input_ids) == text
    assert tokenizer.decode(row.input_ids[row.labels != -100]).startswith("It is 6.<|im_end|>")
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    assert (row.labels[row.labels != -100] == row.input_ids[row.labels != -100]).all()


def test_lengths_and_trained_tokens_are_those_of_the_rows(prepared):
    for index in range(len(prepared.rows)):
        row = prepared.rows.row(index)
        assert prepared.lengths[index] == len(row.input_ids) == len(row.labels)
        assert prepared.trained[index] == (row.labels != -100).sum()
    assert prepared.manifest.tokens == prepared.lengths.sum()
    assert prepared.manifest.trained_tokens == prepared.trained.sum()


def test_the_plan_agrees_with_the_manifest(prepared):
    plan, manifest = prepared.plan, prepared.manifest
    assert manifest.shards == 3 == len(set(plan["shard"]))
    train = plan["split"] == "train"
    per_shard = [len(set(plan["pack"][train & (plan["shard"] == shard)])) for shard in range(3)]
    assert manifest.packs_per_shard == max(per_shard)
    assert prepared.is_eval.sum() == 12
    assert prepared.is_eval[plan["row"][~train]].all()


def test_rows_also_load_with_the_datasets_library(prepared):
    from datasets import load_from_disk

    rows = load_from_disk(str(prepared.directory / "rows"))
    assert rows.column_names == ["input_ids", "labels", "row_id"]
    assert rows[3]["input_ids"] == prepared.rows.row(3).input_ids.tolist()


def test_the_manifest_says_what_went_in(prepared, model):
    manifest = json.loads((prepared.directory / "manifest.json").read_text())
    assert manifest["method"] == "sft"
    assert manifest["model"] == str(model)
    assert manifest["source"]["spec"].endswith("rows.jsonl")
    assert manifest["options"]["max_seq_length"] == 2048
    assert manifest["contract_hash"] == prepared.contract.hash
    assert isinstance(manifest["shards"], int)


def test_the_summary_adds_up(prepared):
    summary = summarize(prepared)
    assert sum(summary.shard_tokens) == summary.tokens == prepared.manifest.tokens
    assert summary.packs == len(set(prepared.plan["pack"]))
    shown = dict(summary.lines())
    assert shown["rows"] == "120 of 123, 12 of them for the eval loss"
    assert shown["duplicates"].startswith("1 rows repeat")


def stamp(directory):
    return (directory / "rows" / "state.json").stat().st_ino


def test_the_same_input_and_options_use_the_data_again(job, capsys):
    first = prepare(job([conversation(n) for n in range(5)]))
    made = stamp(first.directory)
    again = prepare(job())
    assert stamp(again.directory) == made
    assert "already prepared" in capsys.readouterr().err


def test_a_touched_file_with_the_same_content_uses_the_data_again(job, tmp_path):
    made = stamp(prepare(job([conversation(1)])).directory)
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    assert stamp(prepare(job()).directory) == made


def test_changed_content_prepares_the_data_again(job):
    prepare(job([conversation(n) for n in range(5)]))
    assert prepare(job([conversation(n) for n in range(6)])).manifest.rows_kept == 6


@pytest.mark.parametrize("change", [{"max_seq_length": 1024}, {"seed": 1}, {"target_only": False}, {"packing": False}])
def test_a_changed_option_prepares_the_data_again_and_says_which(job, capsys, change):
    made = stamp(prepare(job([conversation(n) for n in range(5)])).directory)
    assert stamp(prepare(job(**change)).directory) != made
    assert next(iter(change)).replace("_", " ") in capsys.readouterr().err


def test_force_prepares_the_data_again(job):
    made = stamp(prepare(job([conversation(1)])).directory)
    assert stamp(prepare(job(force=True)).directory) != made


def test_another_number_of_gpus_is_a_new_plan_for_the_same_rows(job):
    first = prepare(job([conversation(n) for n in range(20)]))
    made = stamp(first.directory)
    second = prepare(job(gpus=4))
    assert stamp(second.directory) == made
    assert (first.manifest.shards, second.manifest.shards) == (1, 4)
    assert prepare(job()).manifest.shards == 1


def test_the_default_output_depends_on_the_job_alone(job):
    assert default_output(job(output=None)) == default_output(job(output=None, workers=4, gpus=8))
    assert default_output(job(output=None)) != default_output(job(output=None, seed=1))
    assert default_output(job(output=None)).parent == Path("data")
    assert default_output(job(output=None)).name.startswith("sft-rows-")


def test_output_with_something_else_in_it_is_left_alone(job, tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.txt").write_text("five years")
    for force in (False, True):
        with pytest.raises(UserError, match="not prepared data"):
            prepare(job([conversation(1)], force=force))
        assert (tmp_path / "prepared" / "thesis.txt").read_text() == "five years"


@pytest.mark.parametrize("place", [".", "..", "rows.jsonl"])
def test_force_does_not_replace_the_place_the_user_works_in(job, tmp_path, monkeypatch, place):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work" if place != "rows.jsonl" else tmp_path)
    with pytest.raises(UserError):
        prepare(job([conversation(1)], output=Path(place), force=True))
    assert (tmp_path / "rows.jsonl").exists()


def test_nothing_is_left_behind_by_a_job_that_fails(job, tmp_path):
    with pytest.raises(UserError):
        prepare(job(["{", "{"]))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_only_bad_rows_are_an_error_that_counts_reasons_and_names_lines(job):
    rows = [{"messages": [{"role": "user", "content": "Hello?"}]}] * 6
    with pytest.raises(UserError, match=r"None of the 6 rows .*6 x .*\(lines 1, 2, 3, \.\.\.\)"):
        prepare(job(rows))


def test_strict_refuses_any_bad_row(job):
    with pytest.raises(UserError, match=r"1 of 3 rows .* are bad: 1 x .*\(line 2\)") as error:
        prepare(job([conversation(1), "{broken", conversation(2)], strict=True))
    assert "--strict" in error.value.hint


def test_a_full_disk_is_one_clear_error(job, tmp_path):
    resource = pytest.importorskip("resource")
    made = job([conversation(n, words=40) for n in range(3000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses what goes beyond
    try:
        with pytest.raises(UserError, match=r"Cannot write .*prepared"):
            prepare(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "prepared").exists()


def test_an_unwritable_output_is_found_before_the_input_is_read(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        prepare(
            job([conversation(1)], output=tmp_path / "file" / "out", input_is_read=False)
            if False
            else job(output=tmp_path / "file" / "out")
        )


def pools_of(monkeypatch):
    """The workers of each pool that is started."""
    started, in_pool = [], build.build_in_pool

    def counted(batches, recipe, workers):
        started.append(workers)
        return in_pool(batches, recipe, workers)

    monkeypatch.setattr(build, "build_in_pool", counted)
    return started


def test_workers_write_what_one_process_writes(job, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_ROWS", 20)
    rows = [conversation(number) for number in range(400)]
    rows[33] = "{broken"
    pools = pools_of(monkeypatch)
    alone = prepare(job(rows, output=tmp_path / "alone", workers=2))
    assert not pools  # so little data is done before processes start
    monkeypatch.setattr(build, "START_SECONDS", -1.0)
    together = prepare(job(output=tmp_path / "together", workers=2))
    assert pools == [2]
    for name in ("rows/data-00000-of-00001.arrow", "dropped.jsonl", "prompt.json"):
        assert (alone.directory / name).read_bytes() == (together.directory / name).read_bytes()
    assert (alone.plan["pack"] == together.plan["pack"]).all()
    assert alone.manifest.digest == together.manifest.digest


def test_a_worker_that_dies_is_an_error_with_a_way_out(job):
    recipe = build.Recipe(resolve_model(job().model), False, None, None, True, 64, "drop")

    def batches():
        yield []
        for process in active_children():
            process.kill()
        yield []

    with pytest.raises(WorkerFailed, match="ended before its work was done") as error:
        list(build.build_in_pool(batches(), recipe, 1))
    assert "--workers" in error.value.hint


def test_an_error_of_a_worker_keeps_its_hint():
    assert pickle.loads(pickle.dumps(UserError("cause", "way out"))).hint == "way out"


def test_rows_are_read_no_faster_than_they_are_built(job, monkeypatch):
    """Memory must not grow with the input."""
    monkeypatch.setattr(build, "BATCH_ROWS", 10)
    made = job([conversation(n) for n in range(400)])
    source = open_source(made.input)
    tokenizer = tiny_tokenizer()
    recipe = build.Recipe(
        resolve_model(made.model), False, contract_for(tokenizer), detect_format(source.columns, {}), True, 64, "drop"
    )
    read = 0

    def counted():
        nonlocal read
        for row in source.rows():
            read += 1
            yield row

    ahead = []
    built = 0
    for one in build.build_all(counted(), recipe, tokenizer, workers=1):
        built += one.rows_in
        ahead.append(read - built)
    assert built == 400
    assert max(ahead) <= 10


def test_answers_without_a_mark_or_a_working_have_a_way_out():
    assert "--map problem=question" in way_out(Counter({NO_MARK: 3, "no answer": 1}))
    assert "--method grpo" in way_out(Counter({NO_WORKING: 3}))


def test_many_different_reasons_do_not_swell_the_manifest():
    tally = Tally()
    for line in range(1, 1001):
        tally.drop(line, f"refused: {line}")
    assert tally.dropped.total() == 1000
    assert tally.dropped["other reasons"] == 900


def test_the_template_that_nobody_chose_is_named(job, capsys):
    prepare(job([conversation(1)]))
    assert "Rows are read as messages; prompts follow the chat template of" in capsys.readouterr().err


def test_long_rows_make_smaller_batches():
    from opensloth.data.sources.open import RawRow

    rows = [RawRow(line, {"messages": [{"content": "x" * (build.BATCH_CHARACTERS // 3)}]}) for line in range(1, 10)]
    assert [len(batch) for batch in build.batched(rows)] == [4, 4, 1]
    assert [len(batch) for batch in build.batched(RawRow(line, {"a": "b"}) for line in range(1100))] == [500, 500, 100]


@pytest.mark.parametrize("name", ["manifest.json", "plan.parquet", "prompt.json", "dropped.jsonl", "rows/state.json"])
def test_a_missing_file_is_an_error_that_names_it(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=str(copy / name)):
        open_prepared(copy)


def test_rows_that_lost_their_ends_are_counted(job):
    rows = [conversation(1), conversation(2, words=3), conversation(11, words=90)]
    data = prepare(job(rows, max_seq_length=24, overlong="truncate", target_only=False))
    long = prepare(job(target_only=False)).lengths > 24
    assert data.manifest.truncated == long.sum() > 0
    assert data.manifest.rows_kept == 3
    assert ("truncated", f"{long.sum()} rows were too long and lost their ends") in summarize(data).lines()


@pytest.mark.parametrize(
    "name", ["manifest.json", "plan.parquet", "prompt.json", "dropped.jsonl", "rows/data-00000-of-00001.arrow"]
)
def test_a_truncated_file_is_an_error_that_names_it_and_the_way_out(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=str(copy / name)) as error:
        open_prepared(copy)
    assert "--force" in error.value.hint


def test_a_manifest_without_a_field_is_damaged(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["rows_kept"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(rows_kept"):
        open_prepared(copy)


def test_data_of_another_layout_is_an_error(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "layout": 99}))
    with pytest.raises(UserError, match="layout 99"):
        open_prepared(copy)


def test_the_plan_of_other_data_is_an_error(copy, job):
    other = prepare(job([conversation(n) for n in range(120)]))
    (copy / "plan.parquet").write_bytes((other.directory / "plan.parquet").read_bytes())
    with pytest.raises(UserError, match="belongs to other data"):
        open_prepared(copy)


def test_damaged_data_is_prepared_again(job, capsys):
    directory = prepare(job([conversation(n) for n in range(5)])).directory
    (directory / "rows" / "data-00000-of-00001.arrow").write_bytes(b"")
    assert len(prepare(job()).rows) == 5
    assert "Preparing it again" in capsys.readouterr().err


def test_a_directory_that_is_no_prepared_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        open_prepared(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a directory of prepared data"):
        open_prepared(tmp_path)


def test_reshard_keeps_rows_order_and_eval_split(copy, prepared):
    made = stamp(copy)
    again = reshard(copy, 5)
    assert stamp(copy) == made
    assert again.manifest.shards == 5 == again.manifest.options["gpus"]
    assert set(again.plan["shard"]) == set(range(5))
    assert (again.plan["row"] == prepared.plan["row"]).all()
    assert (again.is_eval == prepared.is_eval).all()
    assert open_prepared(copy).manifest == again.manifest


def test_reshard_to_more_shards_than_rows_changes_nothing(copy):
    with pytest.raises(UserError, match="108 training rows cannot fill 109 shards"):
        reshard(copy, 109)
    assert open_prepared(copy).manifest.shards == 3


def test_a_reshard_that_was_killed_between_its_two_files_is_completed(copy):
    manifest = (copy / "manifest.json").read_bytes()
    reshard(copy, 5)
    (copy / "manifest.json").write_bytes(manifest)
    assert open_prepared(copy).manifest.shards == 5


def test_reshard_of_a_hundred_thousand_rows_takes_under_a_second(tmp_path, copy):
    """The rows file is the small one: a plan must not read it."""
    from opensloth.data.prepared import directory as module

    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.6, 100_000).astype(np.int64), 1, 2048)
    options = open_prepared(copy).manifest.options
    start = time.process_time()
    table = module.plan_for(lengths, lengths, {**options, "gpus": 8})
    module.write_plan(copy, table, "digest", 8)
    assert time.process_time() - start < 1


def test_runs_that_start_together_make_the_data_once(tmp_path, model):
    """Two seeds of one job, started at once, name the same default directory."""
    write_rows(tmp_path / "rows.jsonl", [conversation(number) for number in range(30)])
    command = [sys.executable, "-m", "opensloth.cli.data", "rows.jsonl", "--model", str(model)]
    started = [subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-2, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    (made,) = (tmp_path / "data").iterdir()
    open_prepared(made)
