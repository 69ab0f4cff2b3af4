"""The benchmarks of benchmarks/sft.py and grpo.py, rehearsed on a CPU with a tiny model, and how their series go on."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tiny import tiny_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import adds  # noqa: E402
import models  # noqa: E402
import processes  # noqa: E402
import random_rows  # noqa: E402
import series  # noqa: E402
import tables  # noqa: E402

PATIENCE = 240
SFT_NUMBERS = ("tokens_per_second", "rows_per_second", "peak_gib", "share_of_limit")
GRPO_NUMBERS = ("completions", "new_tokens", "seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What both benchmarks write and print; they run beside each other."""
    work = tmp_path_factory.mktemp("benchmarks")
    tiny_tokenizer().save_pretrained(work / "tokenizer")
    models.make("tiny-qwen3", work / "tokenizer", work / "models" / "tiny-qwen3")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    running = {}
    for name in ("sft", "grpo"):
        (work / name).mkdir()
        (work / name / "models").symlink_to(work / "models")
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--rehearse", "--tokenizer", str(work / "tokenizer")]
        command += ["--work", str(work / name), "--output", str(work / f"{name}.json")]
        running[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = {name: process.communicate(timeout=PATIENCE)[0].decode() for name, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0], printed
    return {name: (json.loads((work / f"{name}.json").read_text()), printed[name]) for name in running}


def test_sft_is_measured_beside_trl(reports):
    report, printed = reports["sft"]
    assert {row["impl"] for row in report["rows"]} >= {"opensloth", "trl"}, report["failed"]
    for row in report["rows"]:
        assert all(row[name] > 0 for name in SFT_NUMBERS)
        assert (row["model"], row["adapter_dtype"], row["memory_limit_gib"]) == ("tiny-qwen3", "float32", 16)
        assert row["optimizer"] == "adamw_torch"
        assert f"{row['impl']}" in printed
    assert {"machine", "versions", "command"} <= report.keys()


def test_grpo_is_measured_beside_trl(reports):
    report, _ = reports["grpo"]
    measured = {(row["impl"], row["what"], row["setting"]) for row in report["rows"]}
    assert measured >= {
        ("opensloth", "step", "graph"),
        ("opensloth", "rollout", "graph"),
        ("opensloth", "rollout", "generate"),
        ("trl", "step", "generate"),
        ("trl", "rollout", "generate"),
    }, report["failed"]
    for row in report["rows"]:
        assert all(row[name] > 0 for name in GRPO_NUMBERS)
        # random weights rarely end a completion
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"], rel=0.2)
    step = next(row for row in report["rows"] if (row["impl"], row["what"]) == ("opensloth", "step"))
    assert 0 < step["seconds_rollout"] + step["seconds_train"] < step["seconds"] * 1.1


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="unsloth is installed")
def test_what_is_not_installed_is_listed_as_failed_with_the_reason(reports):
    for report, printed in reports.values():
        failed = [one for one in report["failed"] if one["impl"] == "unsloth"]
        assert failed
        assert all("No module named 'unsloth'" in one["reason"] for one in failed)
        assert "failed: " in printed
        assert not [row for row in report["rows"] if row["impl"] == "unsloth"]


def job(name, script, points=("a", "b", "c"), **more):
    """A job whose process is a script; `told` is what the file of the job says, `keep` keeps."""
    start = (
        "import json, sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom series import keep\n"
        "told = json.loads(Path(sys.argv[1]).read_text())\nfound = Path(told['found'])\n"
    )
    measured = [series.Point(f"{name}/{point}", {"impl": point}) for point in points]
    return series.Job(name, measured, [sys.executable, "-c", start + script], **more)


KEEP_FIRST = "keep(found, told['points'][0]['name'], row={'seconds': 1})\n"


def outcomes(run):
    return {name: outcome.get("failed", "measured") for name, outcome in run.found().items()}


def test_after_a_fault_the_rest_is_measured(tmp_path):
    run = series.Series(tmp_path, minutes=1)
    script = "for point in told['points']:\n    assert point['impl'] != 'b', 'an error of b'\n"
    run.run([job("one", script + "    keep(found, point['name'], row={'seconds': 1})\n")])
    assert outcomes(run) == {
        "one/a": "measured",
        "one/b": "exit code 1: AssertionError: an error of b",
        "one/c": "measured",
    }
    report = run.report(tmp_path / "report.json", "none", lambda rows: {"rows": rows})
    assert report["rows"] == [{"impl": "a", "seconds": 1}, {"impl": "c", "seconds": 1}]
    assert [one["impl"] for one in report["failed"]] == ["b"]


def test_a_process_that_starts_early_waits_for_its_turn(tmp_path):
    """It is there while the one before is measured, and measures nothing before that is through."""
    first = "import os\nwhile not (found.parent / 'there').exists():\n    time.sleep(0.01)\n" + KEEP_FIRST
    second = "from series import await_turn\n(found.parent / 'there').touch()\nawait_turn(told)\n" + KEEP_FIRST
    run = series.Series(tmp_path, minutes=1)
    run.run([job("one", first, "a", seconds=30), job("two", second, "b", early=True), job("three", KEEP_FIRST, "c")])
    assert [(line["name"], "row" in line) for line in run.lines()] == [
        ("one/a", True),
        ("two/b", True),
        ("three/c", True),
    ]


def test_a_process_that_started_early_ends_with_the_series(tmp_path):
    script = "import os\n(found.parent / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    first = (
        "while not (found.parent / 'pid').exists():\n    time.sleep(0.01)\nos.kill(os.getppid(), 15)\ntime.sleep(60)"
    )
    run = series.Series(tmp_path, minutes=1)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        processes.end_on_signal()
        with pytest.raises(SystemExit):
            run.run([job("one", "import os\n" + first, "a"), job("two", script, "b", early=True)])
    finally:
        signal.signal(signal.SIGTERM, handler)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_job_that_measures_nothing_is_given_up(tmp_path):
    run = series.Series(tmp_path, minutes=1)
    run.run([job("one", "Path(found.parent / str(time.time_ns())).touch()\nsys.exit('no error is known')", "abcde")])
    assert len(outcomes(run)) == 5
    assert set(outcomes(run).values()) == {"exit code 1: no error is known"}
    assert len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == series.MOST_IDLE


def test_what_takes_too_long_is_ended_and_the_rest_measured(tmp_path):
    run = series.Series(tmp_path, minutes=1)
    run.run([job("one", KEEP_FIRST + "time.sleep(len(told['points']) > 1 and 60)", points="abc", seconds=0.5)])
    assert outcomes(run) == {"one/a": "measured", "one/b": "not done within 0 s", "one/c": "measured"}


def test_the_same_command_goes_on_after_what_is_there(tmp_path):
    jobs = [job("one", KEEP_FIRST + "sys.exit(len(told['points']) > 1)", points="ab")]
    series.Series(tmp_path, minutes=1).run(jobs)
    before = (tmp_path / "found.jsonl").read_text()
    assert outcomes(series.Series(tmp_path, minutes=1)) == {"one/a": "measured", "one/b": "exit code 1: no output"}
    series.Series(tmp_path, minutes=1).run(jobs)
    assert (tmp_path / "found.jsonl").read_text() == before
    again = series.Series(tmp_path, minutes=1, again=True)
    again.run(jobs)
    assert outcomes(again) == {"one/a": "measured", "one/b": "measured"}


def test_without_time_nothing_is_begun_and_the_report_says_so(tmp_path):
    run = series.Series(tmp_path, minutes=0)
    run.run([job("one", KEEP_FIRST, points="a")])
    report = run.report(tmp_path / "report.json", "none", lambda rows: {"rows": rows})
    assert report["rows"] == []
    assert report["failed"] == [{"impl": "a", "reason": "not run: the time was over"}]


def test_what_cannot_be_made_fails_what_needs_it_and_nothing_else(tmp_path):
    def before():
        series.prepare([sys.executable, "-c", "raise OSError('No space left')"], tmp_path, "a model")

    run = series.Series(tmp_path, minutes=1)
    run.run([job("one", KEEP_FIRST, points="a", before=before), job("two", KEEP_FIRST, points="a")])
    reason = "a model could not be made: exit code 1: OSError: No space left"
    assert outcomes(run) == {"one/a": reason, "two/a": "measured"}


def test_the_best_of_each_library_are_compared():
    speeds = [("opensloth", 30.0), ("unsloth", 5.0), ("unsloth", 10.0), ("trl", 3.0)]
    rows = [{"impl": impl, "setting": f"at {speed}", "tokens_per_second": speed} for impl, speed in speeds]
    [best] = tables.best(rows, lambda row: "a case")
    assert best["times_as_fast_as"] == {"trl": 10.0, "unsloth": 3.0}
    assert best["fastest"]["unsloth"]["setting"] == "at 10.0"
    assert "3.00 times as fast as the best of unsloth (at 10.0)" in tables.told([best])


def test_rows_are_as_long_as_they_should_be(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    random_rows.write_rows(tmp_path / "tokenizer.json", tmp_path / "rows.jsonl", random_rows.Rows(300, 40, 0.7, 8, 128))
    texts = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths = sorted(len(tokenizer(text)["input_ids"]) + 1 for text in texts)  # and the token that ends it
    assert (lengths[0], lengths[-1]) == (8, 128)
    assert 35 < lengths[150] < 46


def test_what_is_kept_of_a_small_addend_tells_how_often_a_sum_was_rounded():
    trial = adds.Trial(512, 64, torch.device("cpu"), rows=512)
    found = {name: trial.kept(part, add) for name, (part, add) in adds.WAYS.items()}
    assert found.pop("product rounded, then added") < 0.5
    assert list(found.values()) == pytest.approx([1.0] * len(found), abs=0.1)
