"""The programs: what they accept, print and exit with."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from opensloth import paths
from opensloth.cli import data, document, grpo, options, program, result, sft, train
from opensloth.config.base import declared
from opensloth.config.jobs import DataJob, GrpoJob, SftJob, TrainGrpoJob, TrainSftJob
from opensloth.errors import STOPPED, OpenSlothError, RunStopped, WorkerFailed
from tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
PROGRAMS = {"os-data": data.app, "os-sft": sft.app, "os-grpo": grpo.app, "os-train": train.app}
COMMANDS = [
    (data.app, ["prepare"], DataJob),
    (sft.app, [], SftJob),
    (grpo.app, [], GrpoJob),
    (train.app, ["sft"], TrainSftJob),
    (train.app, ["grpo"], TrainGrpoJob),
]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "pyarrow", "numpy"}
MOST_MODULES = 560  # Python's own, typer's, rich's, pydantic's and our options: 420 to 490
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
    }
    for i in range(30)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with one good input, one row of it bad."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]) + "\n")
    return tmp_path


@pytest.fixture
def call(capsys):
    """Run a program in this process: its exit code, stdout and stderr."""
    importlib.import_module("torch")  # os-data hides it from a process that has not loaded it

    def run(app: typer.Typer, *arguments: object) -> tuple[int, str, str]:
        code = program.run(app, [str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def child(module: str, *arguments: str, code: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", module]
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def program_that(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        raise error

    return app


# how a program ends


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OpenSlothError("Wrong.", "Do this."), 2),
        (WorkerFailed("Wrong.", "Do this."), 3),
        (RunStopped("Wrong.", "Do this."), 75),
    ],
)
def test_an_expected_failure_is_one_line_a_hint_and_its_code(call, error, status):
    code, out, err = call(program_that(error))
    assert (code, out, err) == (status, "", "error: Wrong.\n  Do this.\n")


def test_ctrl_c_is_75_and_one_line(call):
    code, out, err = call(program_that(KeyboardInterrupt()))
    assert (code, out) == (75, "")
    assert err.startswith("error: Interrupted.\n")


def test_a_schedulers_signal_ends_a_program_as_ctrl_c_does(call, tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        with paths.new_directory(tmp_path / "data") as half:
            (half / "rows").touch()
            signal.raise_signal(signal.SIGTERM)

    code, _, err = call(app)
    assert (code, list(tmp_path.iterdir())) == (75, [])
    assert err.startswith("error: Interrupted.\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("shell", [signal.default_int_handler, signal.SIG_IGN])  # the second in the background
def test_both_signals_are_as_they_were_afterwards(call, shell):
    app, seen = typer.Typer(), []
    app.command()(lambda: seen.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))))
    before = signal.signal(signal.SIGINT, shell)
    try:
        assert call(app)[0] == 0
        assert signal.getsignal(signal.SIGINT) is shell
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[0] is not signal.SIG_DFL
    assert (seen[1] is shell) == (shell is signal.SIG_IGN)


def test_a_bug_keeps_its_traceback_and_exits_1():
    code = (
        "import sys; from opensloth.cli import data, program; import opensloth.data.show.terminal as s\n"
        "s.show = lambda *a, **k: 1 / 0\nsys.exit(program.run(data.app, ['show', 'x']))"
    )
    done = child("", code=code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_reader_that_leaves_is_a_quiet_end(tmp_path):
    code = (
        "import sys; from opensloth.cli import data, program; import opensloth.data.show.terminal as s\n"
        "s.show = lambda *a, **k: print('x' * 10**6)\nsys.exit(program.run(data.app, ['show', 'x']))"
    )
    pipe = f'"{sys.executable}" -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


# what a program takes


def test_underscores_and_dashes_are_the_same_in_option_names_and_not_in_values(monkeypatch):
    seen = []
    app = options.new_app("x")
    options.add_command(app, "sft", SftJob, seen.append, help="x")
    assert program.run(app, ["my_dir", "--load_in_4bit", "--report_to", "none", "--output", "a_b"]) == 0
    job = seen[0].job
    assert (str(job.data), job.load_in_4bit, job.report_to, str(job.output)) == ("my_dir", True, ("none",), "a_b")


def test_options_that_were_not_given_keep_the_origin_default():
    seen = []
    app = options.new_app("x")
    options.add_command(app, "data", DataJob, seen.append, help="x")
    flags = ["in", "--model", "m", "--full-conversation", "--map", "a=b", "--map", "c=d", "-n", "5"]
    assert program.run(app, flags) == 0
    job, origins = seen[0].job, seen[0].resolved.origins
    assert (job.target_only, job.map, job.samples, job.packing) == (False, ("a=b", "c=d"), 5, True)
    given = {"input", "model", "target_only", "map", "samples"}
    assert {name for name, origin in origins.items() if origin == "flag"} == given


@pytest.mark.parametrize(
    ("app", "arguments", "says"),
    [
        (sft.app, ["d", "--lora-rr", "4"], "No such option: --lora-rr"),
        (sft.app, ["d", "--lr", "fast"], "--lr fast"),
        (sft.app, ["d", "e"], "unexpected extra argument"),
        (sft.app, [], "DIR is missing"),
        (sft.app, ["nowhere"], "nowhere"),
        (train.app, ["stf", "x"], "Did you mean 'sft'?"),
        (train.app, ["sft", "x"], "--model is missing"),
        (data.app, ["x.jsonl"], "--model is missing"),
        (data.app, ["shwo", "x"], "Did you mean show?"),
        (data.app, ["show"], "Missing argument 'DIR'"),
        (data.app, ["show", "nowhere"], "nowhere"),
        (data.app, ["reshard", "nowhere", "--gpus", "0"], "--gpus"),
        (data.app, ["nothing.jsonl", "--model", "m"], "nothing.jsonl does not exist"),
    ],
)
def test_a_wrong_command_line_exits_2_with_one_line_and_a_hint(here, call, app, arguments, says):
    code, out, err = call(app, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2


def test_an_option_of_the_other_command_is_sent_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["os-sft", "dir", "--max_seq_length", "5"])
    monkeypatch.setattr(sft, "leave", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        sft.main()
    assert "os-data" in capsys.readouterr().err


def test_a_file_may_be_called_like_a_mistyped_command(here, call):
    (here / "shwo").write_text("")
    assert "Did you mean show" not in call(data.app, "shwo", "--model", "m")[2]


# help and docs


@pytest.mark.parametrize(("app", "path", "settings"), COMMANDS)
def test_every_setting_is_in_the_help_of_its_command(call, monkeypatch, app, path, settings):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = call(app, *path, "--help")
    assert code == 0
    for item in declared(settings):
        spelled = [item.spelled] if item.extra("hidden") else options.spellings(item)[0].split("/")
        assert all(name in out for name in spelled), item.name


@pytest.mark.parametrize("app", PROGRAMS.values())
def test_h_is_help(call, app):
    assert call(app, "-h") == call(app, "--help")


def test_the_help_of_os_data_shows_the_commands_and_the_options_of_preparing(call):
    out = call(data.app, "--help")[1]
    assert all(word in out for word in ("show", "reshard", "--max-seq-length"))


@pytest.mark.parametrize(
    ("program_name", "command"),
    [
        *(("data", command) for command in ([], ["prepare"], ["show"], ["reshard"])),
        ("sft", []),
        ("grpo", []),
        *(("train", command) for command in ([], ["sft"], ["grpo"], ["demo"], ["verify", "sft"])),
    ],
)
def test_help_loads_little_and_nothing_heavy(program_name, command):
    """How long loading takes depends on the machine; how much is loaded does not."""
    code = (
        f"import sys; from opensloth.cli import {program_name}, program\n"
        f"code = program.run({program_name}.app, {[*command, '--help']!r})\n"
        "print('loaded', *sorted(sys.modules))\nsys.exit(code)"
    )
    done = child("", code=code)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    assert len(loaded) < MOST_MODULES


def test_the_option_tables_in_docs_are_those_of_the_declarations():
    committed = (ROOT / document.FILE).read_text()
    assert committed == document.document(), "run: python -m opensloth.cli.document"


@pytest.mark.parametrize(("command", "settings"), document.COMMANDS.items())
def test_every_option_is_in_the_docs(command, settings):
    section = document.document().split(f"## {command}\n")[1].split("\n## ")[0]
    for item in declared(settings):
        assert item.extra("hidden") or f"`{item.flag}" in section


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_has_its_entry_point(name):
    import tomllib

    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][name].split(":")
    assert callable(getattr(importlib.import_module(module), function))


# shell completion


def complete(words: str) -> list[str]:
    name = words.split()[0]
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    module = f"opensloth.cli.{name.removeprefix('os-')}"
    code = f"import sys; sys.argv = [{name!r}]; import {module} as m; m.main()"
    count = str(len(words.split(" ")) - 1)
    done = child("", code=code, **{variable: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count})
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_choices():
    assert complete("os-data re") == ["reshard"]
    assert complete("os-data x.jsonl --max-seq") == ["--max-seq-length"]
    assert complete("os-sft d --engine ") == ["auto", "native", "unsloth"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_program_prints_a_completion_script(shell):
    code = "import sys; sys.argv = ['os-sft']; from opensloth.cli import sft; sft.main()"
    done = child("", code=code, _OS_SFT_COMPLETE=f"source_{shell}")
    assert done.returncode == 0
    assert "_OS_SFT_COMPLETE" in done.stdout


# os-data from end to end


def test_os_data_prepares_says_what_came_of_it_and_what_is_next(here, call, model):
    code, out, err = call(data.app, "rows.jsonl", "--model", model, "--output", "my data", "--gpus", 2)
    assert code == 0, err
    assert "30 of 31" in out
    assert "1 x broken JSON" in out
    assert str(Path("my data", "dropped.jsonl")) in out
    assert out.splitlines()[-1].split(maxsplit=1) == ["next", "os-sft 'my data'"]
    manifest = json.loads((here / "my data" / "manifest.json").read_text())
    assert (manifest["rows_kept"], manifest["shards"]) == (30, 2)


def test_os_data_prints_one_line_of_json_where_a_program_reads_it(here, call, model):
    code, out, _ = call(data.app, "prepare", "rows.jsonl", "--model", model, "--json")
    assert code == 0
    record = json.loads(out)
    assert (record["rows_in"], record["rows_kept"], record["dropped"]) == (31, 30, {"broken JSON": 1})
    assert Path(record["data"], "manifest.json").is_file()
    assert Path(record["data"]).parent == Path("data")


def test_running_again_uses_the_same_data(here, call, model):
    command = ("rows.jsonl", "--model", model, "--json")
    first = call(data.app, *command)
    place = Path(json.loads(first[1])["data"])
    before = (place / "manifest.json").stat().st_mtime_ns
    again = call(data.app, *command)
    assert (again[0], again[1]) == (0, first[1])
    assert (place / "manifest.json").stat().st_mtime_ns == before


def test_os_data_shows_and_reshards_what_it_prepared(here, call, model):
    assert call(data.app, "rows.jsonl", "--model", model, "--output", "d")[0] == 0
    code, out, err = call(data.app, "show", "d", "--row", 3)
    assert code == 0, err
    assert "What is 3 + 3?" in out
    assert call(data.app, "show", "d", "--row", 99)[0] == 2
    assert call(data.app, "show", "d", "-n", 2, "--html", "page.html")[0] == 0
    assert "<html" in (here / "page.html").read_text()
    code, out, _ = call(data.app, "reshard", "d", "--gpus", 3, "--json")
    assert (code, json.loads(out)["shards"]) == (0, 3)


@pytest.mark.parametrize(
    ("content", "extra", "says"),
    [
        ("{broken\n", [], "broken JSON"),
        ('{"a": 1}\n', [], "a"),
        ("", [], "rows.jsonl"),
        (json.dumps(ROWS[0]) + "\n{broken\n", ["--strict"], "1 of 2 rows"),
        (json.dumps(ROWS[0]) + "\n", ["--gpus", "2"], "Lower --gpus"),
        (json.dumps(ROWS[0]) + "\n", ["--max-seq-length", "8"], "Raise --max-seq-length"),
        (json.dumps(ROWS[0]) + "\n", ["--chat-template", "reasoning"], "columns of their own"),
        (json.dumps(ROWS[0]) + "\n", ["--overlong", "cut"], "drop, truncate, error"),
        (json.dumps(ROWS[0]) + "\n", ["--output", "rows.jsonl"], "rows.jsonl"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_a_hint(here, call, model, content, extra, says):
    (here / "rows.jsonl").write_text(content)
    code, out, err = call(data.app, "rows.jsonl", "--model", model, *extra)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("error:")]
    assert says in "\n".join(lines[place:])
    assert len(lines[place:]) <= 2


# dry runs


def everything_in(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_dry_run_of_os_data_says_what_would_happen_and_touches_nothing(here, call, model):
    before = everything_in(here)
    code, out, err = call(data.app, "rows.jsonl", "--model", model, "--max-seq-length", 128, "--dry-run")
    assert code == 0, err
    assert everything_in(here) == before
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert "128" in lines["max_seq_length"]
    assert "(flag)" in lines["max_seq_length"]
    assert "30 of 31" in lines["rows"]
    assert "overlong" not in lines


def test_a_dry_run_finds_the_mistakes_that_the_run_would_find(here, call, model):
    assert call(data.app, "nothing.jsonl", "--model", model, "--dry-run")[0] == 2
    assert call(data.app, "rows.jsonl", "--model", model, "--map", "problem=question", "--dry-run")[0] == 2


def test_a_dry_run_knows_the_layers_of_the_model(here, call, model):
    job = ("sft", "rows.jsonl", "--model", model, "--processes", 1, "--lora-targets")
    code, _, err = call(train.app, *job, "q_proj,w_proj", "--dry-run")
    assert code == 2
    assert "The model has no layer w_proj (--lora-targets)." in err
    assert "q_proj" in err.split("Its linear layers: ")[1]
    assert call(train.app, *job, "q_proj,v_proj", "--dry-run")[0] == 0


def test_a_dry_run_fetches_nothing_from_a_hub(here, call, model, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    code, out, _ = call(data.app, "someone/set", "--model", model, "--dry-run")
    assert code == 0
    assert "not estimated" in out
    code, out, _ = call(data.app, "rows.jsonl", "--model", "someone/model", "--dry-run")
    assert code == 0
    assert "someone/model is not on this machine" in out


def test_a_dry_run_of_the_one_command_judges_by_the_first_rows(here, call, model):
    row = json.dumps(ROWS[0]) + "\n"
    (here / "many.jsonl").write_text(row * 3000)
    code, out, err = call(train.app, "sft", "many.jsonl", "--model", model, "--processes", 2, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)["plan"]
    assert plan["judged by"] == "the first 1,000 rows: an estimate"
    assert plan["rows"] == "about 3,000 of 3,000"
    assert not (here / "data").exists()
    assert not (here / "outputs").exists()


def test_a_dry_run_of_os_sft_counts_the_steps_of_the_prepared_data(here, call, model):
    assert call(data.app, "rows.jsonl", "--model", model, "--output", "d", "--json")[0] == 0
    before = everything_in(here)
    command = ("d", "--processes", 2, "--tokens-per-step", 200, "--epochs", 2, "--dry-run", "--json")
    code, out, err = call(sft.app, *command)
    assert code == 0, err
    assert everything_in(here) == before
    record = json.loads(out)
    tokens = json.loads((here / "d" / "manifest.json").read_text())["tokens"]
    assert int(record["plan"]["steps"].split(",")[0]) in range(2 * (tokens // 240), 2 * (tokens // 200) + 3)
    assert record["job"]["model"] == {"value": str(model), "origin": "data"}
    assert record["job"]["seed"] == {"value": 3407, "origin": "data"}
    assert "memory" in record["plan"]


# os-sft and its data must agree


def test_a_config_file_that_contradicts_the_data_names_both(here, call, model):
    assert call(data.app, "rows.jsonl", "--model", model, "--output", "d", "--max-seq-length", 64)[0] == 0
    (here / "job.yaml").write_text("max_seq_length: 64\nmap: []\nlr: 1e-3\n")
    assert call(sft.app, "d", "--config", "job.yaml", "--processes", 1, "--dry-run")[0] == 0
    (here / "job.yaml").write_text("max_seq_length: 128\n")
    code, _, err = call(sft.app, "d", "--config", "job.yaml", "--processes", 1, "--dry-run")
    assert code == 2
    assert "max_seq_length 128" in err
    assert "max_seq_length 64" in err


def test_a_data_setting_in_a_config_file_that_cannot_be_is_a_mistake_too(here, call, model):
    assert call(data.app, "rows.jsonl", "--model", model, "--output", "d")[0] == 0
    (here / "job.yaml").write_text("max_seq_length: 2\n")
    code, _, err = call(sft.app, "d", "--config", "job.yaml", "--processes", 1, "--dry-run")
    assert code == 2
    assert "job.yaml: max_seq_length 2" in err


def test_a_dry_run_neither_runs_a_models_own_code_nor_asks_for_it(here, call, model):
    import shutil

    assert call(data.app, "rows.jsonl", "--model", model, "--output", "d")[0] == 0
    other = Path(shutil.copytree(model, here / "own-code"))
    (other / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (other / "own.py").write_text("raise SystemExit(7)")
    code, _, err = call(sft.app, "d", "--model", other, "--processes", 1, "--dry-run")
    assert code == 2
    assert f"error: {other} cannot be loaded" in err


def test_a_model_that_reads_other_tokens_than_the_data_is_refused(here, call, model):
    from tiny import tiny_tokenizer

    assert call(data.app, "rows.jsonl", "--model", model, "--output", "d")[0] == 0
    other = here / "other"
    other.mkdir()
    (other / "config.json").write_text((model / "config.json").read_text())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    code, _, err = call(sft.app, "d", "--model", other, "--processes", 1, "--dry-run")
    assert code == 2
    assert "--model" in err
    assert str(model) in err


def test_the_end_of_a_run_says_where_the_adapter_is_and_how_to_watch_it(tmp_path, capsys):
    from opensloth.launch.run_directory import Result

    (tmp_path / "tensorboard").mkdir()
    ended = Result(tmp_path, "trained", {"steps": 1200, "loss": 0.123456, "eval_loss": None})
    result.report(ended, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trained", str(tmp_path)]
    assert [line.split() for line in lines[1:3]] == [["steps", "1,200"], ["loss", "0.1235"]]
    assert str(tmp_path / "tensorboard") in lines[3]
    assert len(lines) == 4
    result.report(ended, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "output": str(tmp_path),
        "status": "trained",
        "metrics": ended.metrics,
    }


def test_one_command_does_what_the_two_do_and_knows_when_it_is_finished(here, call, model):
    shared = ("--processes", 1, "--max-steps", 2, "--json")
    code, out, err = call(train.app, "sft", "rows.jsonl", "--model", model, "--eval-fraction", 0.1, *shared)
    assert code == 0, err
    first = json.loads(out)
    assert first["status"] == "trained"
    assert first["metrics"]["steps"] == 2
    assert (here / first["output"] / "adapter_model.safetensors").is_file()
    (prepared,) = (here / "data").iterdir()
    code, out, err = call(sft.app, prepared, *shared)
    assert code == 0, err
    assert json.loads(out) == {**first, "status": "already finished"}
    code, _, err = call(sft.app, prepared, *shared, "--output", first["output"], "--lr", "1e-3")
    assert code == 2
    assert "lr (0.0002 there, 0.001 now)" in err


def test_a_signal_within_text_that_is_executed_ends_a_program_with_its_code(tmp_path):
    """Python would end by SIGINT where the very KeyboardInterrupt once passed through `exec`, as dataclasses use it."""
    (tmp_path / "ended.py").write_text(
        "import sys, typer\n"
        "from opensloth.cli import program\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def main():\n"
        "    exec('import signal; signal.raise_signal(signal.SIGTERM)')\n"
        "sys.exit(program.run(app, []))\n"
    )
    ended = subprocess.run([sys.executable, "-m", "ended"], cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert ended.returncode == STOPPED


def test_what_a_killed_command_left_is_removed_when_nobody_can_be_at_work_on_it(tmp_path):
    target, long_ago = tmp_path / "rows", time.time() - 2 * paths.LEFT_SECONDS
    left, busy, other = (tmp_path / name for name in (".rows.abc", ".rows.def", ".rows2.abc"))
    for directory in (left, busy, other):
        directory.mkdir()
        (directory / "part").touch()
        os.utime(directory / "part", (long_ago, long_ago))
        os.utime(directory, (long_ago, long_ago))
    (busy / "part").touch()
    with paths.new_directory(target) as directory:
        (directory / "done").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rows.def", ".rows2.abc", "rows"]


def test_a_command_ends_at_once_with_its_code_and_all_that_it_said():
    code = (
        "import atexit, sys; from opensloth.cli.program import leave\n"
        "atexit.register(lambda: print('last')); print('first', end=' '); leave(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "first last\n", "")
