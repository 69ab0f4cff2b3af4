"""Training end to end on a tiny model: the real command where processes matter, else its worker in this process."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opensloth.data.prepared.directory import open_prepared
from opensloth.engine import lora
from opensloth.errors import WorkerFailed
from opensloth.training.callbacks import Metrics, check_equal
from opensloth.training.sft import run as run_sft
from opensloth.training.sft.loader import Batcher
from opensloth.training.stopping import StopOnSignal
from tiny import save_tiny_model
from training_fixtures import SECRET, begin, call, end, environment, sft, wait_for, write_rows  # noqa: F401

STEPS = 40
SAME = 1e-5
# packs smaller than a step, an eval split, more than one epoch
JOB = ("rows.jsonl", "--model", "model", "--dtype", "float32", "--eval-fraction", 0.15, "--max-steps", STEPS)
JOB += ("--tokens-per-step", 300, "--pack-tokens", 160, "--eval-steps", 15, "--save-steps", 15)
SMALL = ("rows.jsonl", "--model", "model", "--max-steps", 2, "--tokens-per-step", 200, "--processes", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model and 48 rows, which the commands of this module share."""
    directory = tmp_path_factory.mktemp("training")
    save_tiny_model(directory / "model")
    write_rows(directory / "rows.jsonl")
    return directory


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def hub():
    """A hub that nobody should ask: it remembers each request."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def commands(place, hub):
    """The real command three times: to its end, stopped by SIGTERM and called again, and with two processes."""
    url, _ = hub
    whole = begin(place, *JOB, "--processes", 1, "--output", "whole", HF_ENDPOINT=url)
    wait_for(lambda: list(place.glob("data/*/manifest.json")), whole, "prepared data")
    cut = begin(place, *JOB, "--processes", 1, "--output", "cut")
    logged = place / "cut" / "metrics.jsonl"
    wait_for(lambda: logged.exists() and logged.read_text(), cut, "the first step")
    cut.send_signal(signal.SIGTERM)
    outcomes = {"whole": end(whole), "stopped": end(cut)}
    outcomes["stopped at"] = metrics(place / "cut")[-1]["step"]
    again = begin(place, *JOB, "--processes", 1, "--output", "cut")
    outcomes["resumed"] = end(again)
    outcomes["two"] = end(begin(place, *JOB, "--processes", 2, "--check-every", 7, "--output", "two"))
    return outcomes


@pytest.fixture(scope="module")
def run(place, commands):
    """The run directory of the whole run."""
    code, out = commands["whole"]
    assert code == 0, out
    return place / "whole"


def metrics(directory, key="step"):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if key in entry]


def record(directory, name):
    return json.loads((directory / name).read_text())


def largest_difference(one, other):
    first, second = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_a_run_directory_holds_everything_that_belongs_to_the_run(run):
    assert {path.name for path in run.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "prompt.json"),
        *("job.json", "result.json", "metrics.jsonl", "tensorboard", "logs", "best", "checkpoints"),
    }
    assert [path.name for path in (run / "logs").iterdir()] == ["rank_0.log"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-30", f"checkpoint-{STEPS}"]
    assert record(run / "best", "best.json")["eval_loss"] == min(e["eval_loss"] for e in metrics(run, "eval_loss"))
    for place in (run / "best", run / "checkpoints" / "checkpoint-30"):
        assert {"adapter_model.safetensors", "tokenizer.json", "prompt.json"} <= {path.name for path in place.iterdir()}


def test_job_json_says_each_setting_with_its_origin(run):
    settings = record(run, "job.json")["settings"]
    assert settings["max_steps"] == {"value": STEPS, "origin": "flag"}
    assert settings["lora_r"] == {"value": 16, "origin": "default"}


def test_the_adapter_loads_with_plain_peft_and_gives_the_trained_models_eval_loss(run, place):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(run, is_trainable=True).eval()
    result = record(run, "result.json")
    assert lora.weights_hash(model) == result["weights_sha256"]
    prepared = open_prepared(Path(record(run, "job.json")["data"]["directory"]))
    held_out = [int(row) for row in prepared.is_eval.nonzero()[0]]
    total, targets = 0.0, 0
    for row in held_out:
        batch = Batcher(prepared, packing=False, pad_id=0)([row])
        targets += int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum"))
    assert total / targets == pytest.approx(result["eval_loss"], abs=SAME)
    assert metrics(run, "eval_loss")[0]["eval_loss"] > result["eval_loss"]


def test_the_adapter_names_its_base_by_an_absolute_path(run, place):
    assert record(run, "adapter_config.json")["base_model_name_or_path"] == str(place / "model")


def test_the_eval_loss_is_taken_every_n_steps_and_once_at_the_end(run):
    assert [entry["step"] for entry in metrics(run, "eval_loss")] == [15, 30, STEPS]


def test_tensorboard_shows_the_run(run):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")} <= tags
    assert "eval/loss" in tags
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_every_step_is_logged_with_its_speed_and_place(run):
    steps = metrics(run, "loss")
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    for name in ("grad_norm", "learning_rate", "epoch", "tokens_per_second", "memory_gib"):
        assert all(entry[name] >= 0 for entry in steps), name
    assert steps[-1]["epoch"] > 1


def test_the_person_reads_our_lines_and_no_others(run, commands):
    _, out = commands["whole"]
    log = (run / "logs" / "rank_0.log").read_text()
    assert f"step {STEPS}/{STEPS}" in out
    assert f"{STEPS} optimizer steps of about" in log
    for noise in ("{'loss'", "train_runtime", "Warning", "warning", "it/s]"):
        assert noise not in log, noise
        assert noise not in out, noise


def test_secrets_of_the_environment_are_written_nowhere(run, place):
    assert environment()["HF_TOKEN"] == SECRET
    written = [path for path in place.rglob("*") if path.is_file()]
    assert len(written) > 50
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_training_asks_no_server_for_anything(run, hub):
    """Neither telemetry nor a look for a newer model: the model is a directory on this machine."""
    _, asked = hub
    assert asked == []


# --- stopping and going on ---------------------------------------------------------------------------------------


def test_sigterm_saves_the_step_and_exits_with_75(commands, place):
    code, out = commands["stopped"]
    assert code == 75, out
    step = commands["stopped at"]
    assert 1 <= step < STEPS
    assert f"Stopped by SIGTERM after step {step}, which is saved." in out


def test_a_resumed_run_ends_with_the_same_bytes_as_one_that_was_never_stopped(commands, run, place):
    code, out = commands["resumed"]
    assert code == 0, out
    assert f"going on from {place / 'cut' / 'checkpoints'}/checkpoint-{commands['stopped at']}" in out
    name = "adapter_model.safetensors"
    assert (place / "cut" / name).read_bytes() == (run / name).read_bytes()
    assert (place / "cut" / "best" / name).read_bytes() == (run / "best" / name).read_bytes()
    events = EventAccumulator(str(place / "cut" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    logged = [[(entry["step"], entry["loss"]) for entry in metrics(place / at, "loss")] for at in ("cut", "whole")]
    assert logged[0] == logged[1]


def test_with_dropout_too_a_run_stopped_at_any_step_is_resumed_exactly(here, call, monkeypatch):  # noqa: F811
    job = (*SMALL, "--max-steps", 8, "--save-steps", 3, "--lora-dropout", 0.2)
    assert call(*job, "--output", "dropout")[0] == 0
    on_log = Metrics.on_log

    def stop_at_4(self, args, state, *rest, **more):
        on_log(self, args, state, *rest, **more)
        if state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_log", stop_at_4)
        code, out = call(*job, "--output", "dropout-cut")
    assert (code, "after step 4" in out or "after step 5" in out) == (75, True), out
    assert call(*job, "--output", "dropout-cut")[0] == 0
    name = "adapter_model.safetensors"
    assert (here / "dropout" / name).read_bytes() == (here / "dropout-cut" / name).read_bytes()
    plain = (*SMALL, "--max-steps", 8)
    assert call(*plain, "--output", "no-dropout")[0] == 0
    assert (here / "dropout" / name).read_bytes() != (here / "no-dropout" / name).read_bytes()


@pytest.fixture
def evaluate_and(monkeypatch):
    """`evaluate_and(act)`: calls `act(number)` before each held-out micro-batch, numbered from 1 in each run."""

    describe = run_sft.describe_run

    def choose(act):
        def described(*arguments):
            run, seen = describe(*arguments), itertools.count(1)

            def loss(model, inputs):
                if not model.training:
                    act(next(seen))
                return run.loss(model, inputs)

            return dataclasses.replace(run, loss=loss)

        monkeypatch.setattr(run_sft, "describe_run", described)

    yield choose
    monkeypatch.undo()


def test_a_dropped_evaluation_is_made_up_for(here, call, evaluate_and):  # noqa: F811
    """Of three: the first in its second micro-batch, and by the run that goes on the last one, after training."""
    job = (*SMALL, "--eval-fraction", 0.3, "--pack-tokens", 200, "--max-steps", 5, "--eval-steps", 2, "--save-steps", 3)
    seen = []
    evaluate_and(seen.append)
    assert call(*job, "--output", "evals")[0] == 0
    parts = len(seen) // 3
    assert parts > 2
    for at, steps in ((2, 2), (parts * 2 + 2, 5)):  # it makes up for the first, then makes the second
        seen.clear()
        evaluate_and(lambda number, at=at: (seen.append(number), number == at and signal.raise_signal(signal.SIGUSR1)))
        code, out = call(*job, "--output", "evals-cut")
        assert (code, f"Stopped by SIGUSR1 after step {steps}, which is saved." in out) == (75, True), out
        assert len(seen) == at  # and no micro-batch more
    evaluate_and(seen.append)
    assert call(*job, "--output", "evals-cut")[0] == 0
    whole, cut = here / "evals", here / "evals-cut"
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors", "best/best.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    for key in ("loss", "eval_loss"):
        one, other = ([(entry["step"], entry[key]) for entry in metrics(at, key)] for at in (whole, cut))
        assert one == other != [], key
    assert [entry["step"] for entry in metrics(cut, "eval_loss")] == [2, 4, 5]
    # file by file: lives of one process in one second have names that TensorBoard does not read in their order
    files = [EventAccumulator(str(file)).Reload() for file in (cut / "tensorboard").iterdir()]
    events = [event for file in files if "eval/loss" in file.Tags()["scalars"] for event in file.Scalars("eval/loss")]
    assert sorted(event.step for event in events) == [2, 4, 5]


def test_a_process_that_was_not_asked_drops_its_evaluation_with_the_others(here, call, evaluate_and, monkeypatch):  # noqa: F811
    """Those that were asked have left: nobody is there to add up a loss with."""
    asked = []
    monkeypatch.setattr(StopOnSignal, "anyone_asked", lambda _: bool(asked))
    evaluate_and(asked.append)
    code, out = call(*SMALL, "--eval-fraction", 0.3, "--eval-steps", 1, "--output", "evals-other")
    assert (code, "Stopped by a signal after step 1, which is saved." in out) == (75, True), out
    assert asked
    assert metrics(here / "evals-other", "eval_loss") == []


# --- several processes -------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_does(commands, run, place):
    code, out = commands["two"]
    assert code == 0, out
    for key in ("loss", "grad_norm", "eval_loss"):
        one, two = ([entry[key] for entry in metrics(directory, key)] for directory in (run, place / "two"))
        assert one == pytest.approx(two, abs=SAME), key
    assert largest_difference(run, place / "two") <= SAME
    assert sorted(path.name for path in (place / "two" / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    for checkpoint in (place / "two" / "checkpoints").iterdir():
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}


def test_every_step_tells_where_time_and_room_went(commands, run, place):
    assert commands["two"][0] == 0
    one, two = (metrics(directory, "loss") for directory in (run, place / "two"))
    for entry in [*one, *two]:
        assert 0 <= entry["padding"] < 1
        assert 0 < entry["unfilled"] < 1
    assert {entry["imbalance"] for entry in one} == {1.0}
    assert {entry[f"seconds/{name}"] for entry in one for name in ("sync", "communication")} == {0.0}
    assert all(1 <= entry["imbalance"] <= 2 for entry in two)
    assert any(entry["imbalance"] > 1 for entry in two)
    for entry in two[1:]:
        # the smallest adapter is one bucket: nothing is left of the backward pass that could hide it
        assert 0 < entry["seconds/communication"] <= entry["seconds/sync"] + 1e-3 < entry["seconds/step"] + 1e-3


def test_the_result_tells_what_each_process_spent(commands, run, place):
    assert commands["two"][0] == 0
    one, two = (record(directory, "result.json") for directory in (run, place / "two"))
    assert sum(two["per_process"]["tokens"]) == sum(one["per_process"]["tokens"]) == one["tokens"] == two["tokens"]
    for result, processes in ((one, 1), (two, 2)):
        assert {len(values) for values in result["per_process"].values()} == {processes}
        assert all(0.05 < gib < 8 for gib in result["per_process"]["memory_gib"])
        assert result["memory_gib"] == max(result["per_process"]["memory_gib"])
    assert one["per_process"]["sync_seconds"] == one["per_process"]["communication_seconds"] == [0.0]
    logged = sum(entry["seconds/sync"] for entry in metrics(place / "two", "loss"))
    assert two["per_process"]["sync_seconds"][0] == pytest.approx(logged, abs=0.01)
    assert min(two["per_process"]["sync_seconds"]) > 0


def test_processes_whose_adapters_differ_end_the_run():
    rows = [[1, 2], [3, 4], list(range(5, 50))]
    check_equal(["a", "a", "a"], rows, sound=4, step=7)
    with pytest.raises(WorkerFailed, match="After step 7 the adapter of process 2 is not that of the others") as error:
        check_equal(["a", "a", "b"], rows, sound=4, step=7)
    assert "after step 4 it was. Since then process 2 trained on rows 5, 6, " in error.value.message
    with pytest.raises(WorkerFailed, match="of process 0 is not that of the others"):
        check_equal(["b", "a", "a"], rows, sound=4, step=7)


def test_a_run_of_two_processes_is_gone_on_with_by_one(commands, here, call, run, tmp_path):  # noqa: F811
    assert commands["two"][0] == 0
    moved = Path(shutil.copytree(here / "two", tmp_path / "moved"))
    for name in ("result.json", "adapter_model.safetensors", f"checkpoints/checkpoint-{STEPS}/trainer_state.json"):
        (moved / name).unlink()
    code, out = call(*JOB, "--processes", 1, "--output", moved)
    assert code == 0, out
    assert "processes: 2 before, 1 now" in out
    assert "checkpoint-30" in out
    assert largest_difference(run, moved) <= SAME


def test_two_processes_train_as_one_does_on_padded_batches_of_rows(here, call):  # noqa: F811
    job = ("rows.jsonl", "--model", "model", "--dtype", "float32", "--no-packing", "--eval-fraction", 0.15)
    job += ("--max-steps", 12)
    code, out = end(begin(here, *job, "--batch-size", 2, "--processes", 2, "--output", "rows-two"))
    assert code == 0, out
    assert call(*job, "--batch-size", 2, "--grad-accum", 2, "--processes", 1, "--output", "rows-one")[0] == 0
    for key in ("loss", "grad_norm", "eval_loss"):
        one, two = ([entry[key] for entry in metrics(here / name, key)] for name in ("rows-one", "rows-two"))
        assert one == pytest.approx(two, abs=SAME), key
    assert largest_difference(here / "rows-one", here / "rows-two") <= SAME


# --- a loss that is no number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(here, call, logging_steps):  # noqa: F811
    """Also where nobody would look at it for a long time: before it gets into a checkpoint."""
    name = f"diverged-{logging_steps}"
    job = (*SMALL, "--max-steps", 9, "--warmup-steps", 0, "--lr", 1e30, "--save-steps", 1, "--output", name)
    code, out = call(*job, "--logging-steps", logging_steps)
    assert code == 3, out
    error = out[out.index("error:") :]
    assert "at step 2, rows " in error
    assert "lower --lr" in error
    assert [path.name for path in (here / name / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (here / name / "result.json").exists()


def test_the_rows_of_the_faulty_micro_batch_alone_are_named(here, call, tmp_path):  # noqa: F811
    """One word of row 5 alone has an embedding that is no number."""
    broken = save_tiny_model(tmp_path / "broken")
    tokenizer = AutoTokenizer.from_pretrained(broken)
    config = AutoConfig.from_pretrained(broken, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().weight.data[tokenizer("~").input_ids[0]] = float("nan")
    model.save_pretrained(broken)
    lines = (here / "rows.jsonl").read_text().splitlines()
    lines[5] = lines[5].replace("It is", "~")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    job = (tmp_path / "rows.jsonl", *SMALL[1:], "--model", broken, "--max-steps", 40, "--logging-steps", 7)
    code, out = call(*job, "--pack-tokens", 130, "--save-steps", 50, "--output", tmp_path / "run")
    assert code == 3, out
    named = re.search(r"The loss is nan at step (\d+), rows ([\d, ]+)\.", out)
    assert named, out
    assert "5" in named[2].split(", ")
    assert len(named[2].split(", ")) <= 4


def test_a_model_that_holds_a_nan_is_noticed_at_the_first_step(here, call, tmp_path):  # noqa: F811
    broken = save_tiny_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, out = call(*SMALL, "--model", broken, "--output", tmp_path / "run")
    assert code == 3, out
    assert "The loss is nan at step 1, rows " in out


# --- the other ways to train -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ways",
    [
        ("--load-in-4bit", "--dtype", "float32"),
        ("--load-in-8bit", "--dtype", "float32"),
        ("--load-in-4bit", "--dtype", "bfloat16", "--gradient-checkpointing", "full"),
        ("--use-rslora", "--lora-r", 4, "--lora-targets", "q_proj,down_proj"),
        ("--optim", "adamw_8bit"),
        ("--gradient-checkpointing", "full"),
        ("--gradient-checkpointing", "selective"),
        ("--no-packing", "--lr-scheduler", "cosine"),
    ],
    ids=str,
)
def test_an_adapter_is_trained_in_another_way(here, call, ways, tmp_path):  # noqa: F811
    code, out = call(*SMALL, *ways, "--output", tmp_path / "run")
    assert code == 0, out
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    changed = [name for name, tensor in weights.items() if "lora_B" in name and bool(tensor.any())]
    assert len(changed) == sum("lora_B" in name for name in weights)
    config = record(tmp_path / "run", "adapter_config.json")
    assert config["use_rslora"] == ("--use-rslora" in ways)


def test_small_steps_change_an_adapter_of_a_bfloat16_model(here, call, tmp_path):  # noqa: F811
    """In bfloat16 an update of 5e-6 would be lost beside weights of 0.1; A must move, and not only B from 0."""
    job = (*SMALL, "--dtype", "bfloat16", "--warmup-steps", 0, "--weight-decay", 0)
    for name, rate in (("run", 5e-6), ("start", 1e-30)):
        assert call(*job, "--lr", rate, "--output", tmp_path / name)[0] == 0
    after, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "start"))
    for name in after:
        moved = (after[name] - before[name]).abs().max()
        assert 1e-6 < moved < 2e-5, name


def test_a_constant_learning_rate_is_warmed_up_too(here, call, tmp_path):  # noqa: F811
    job = (*SMALL, "--max-steps", 4, "--lr", 1e-3, "--lr-scheduler", "constant", "--warmup-steps", 2)
    assert call(*job, "--output", tmp_path)[0] == 0
    rates = [entry["learning_rate"] for entry in metrics(tmp_path, "learning_rate")]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_full_finetuning_leaves_a_model_directory(here, call, tmp_path):  # noqa: F811
    code, out = call(*SMALL, "--full-finetuning", "--eval-fraction", 0.1, "--dtype", "float32", "--output", tmp_path)
    assert code == 0, out
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    base = AutoModelForCausalLM.from_pretrained(here / "model").state_dict()
    assert all(bool((trained[name] != base[name]).any()) for name in base if "rotary" not in name)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "best" / "model.safetensors").is_file()
    assert call(*SMALL, "--model", tmp_path, "--output", tmp_path / "next")[0] == 0


def test_training_goes_on_from_an_adapter_with_its_own_rank(here, call, run, tmp_path):  # noqa: F811
    code, out = call(*SMALL, "--model", run, "--dtype", "float32", "--lr", 1e-9, "--output", tmp_path / "next")
    assert code == 0, out
    assert f"training goes on from {run}, with its own r=16" in out
    assert largest_difference(run, tmp_path / "next") < 1e-6
    assert record(tmp_path / "next", "adapter_config.json")["base_model_name_or_path"] == str(here / "model")
    assert record(tmp_path / "next", "prompt.json") == record(run, "prompt.json")


def test_a_model_with_capped_logits_is_trained_on_padded_rows_and_says_why(here, call, tmp_path):  # noqa: F811
    model = save_tiny_model(tmp_path / "gemma2", "gemma2")
    code, out = call(*SMALL, "--model", model, "--output", tmp_path / "run")
    assert code == 0, out
    assert "rows are padded, not packed, with eager attention: it caps attention logits" in out
    code, out = call(*SMALL, "--model", model, "--no-packing", "--output", tmp_path / "padded")
    assert (code, "this model needs eager attention: it caps attention logits" in out) == (0, True), out


def test_fused_linears_are_trained_where_a_model_has_them(here, call, tmp_path):  # noqa: F811
    model = save_tiny_model(tmp_path / "phi3", "phi3")
    assert call(*SMALL, "--model", model, "--output", tmp_path / "run")[0] == 0
    names = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for layer in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert any(layer in name for name in names), layer


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--engine", "unsloth"), "--engine unsloth needs a CUDA card."),
        (("--dtype", "float16"), "--dtype float16 needs a CUDA card."),
        (("--lora-targets", "q_proj,w_proj"), "The model has no layer w_proj (--lora-targets)."),
        (("--full-finetuning", "--model", "{run}"), "--full-finetuning cannot start from the adapter"),
        (("--report-to", "wandb"), "--report-to wandb: wandb is not installed."),
        (("--resume", "nowhere"), "--resume nowhere: there is no such directory."),
        (("--output", "rows.jsonl"), "--output rows.jsonl is a file."),
        (("--output", "model"), "--output model holds something that is no run."),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(here, call, run, tmp_path, wrong, said):  # noqa: F811
    wrong = [word.format(run=run) for word in wrong]
    code, out = call(*SMALL, "--output", tmp_path / "run", *wrong)
    assert code == 2, out
    assert said in out
    assert "Traceback" not in out


def test_an_adapter_of_another_model_is_refused(here, call, run, tmp_path):  # noqa: F811
    """Its base has the same tokenizer, but other layers: wider ones, or one more."""
    for name, change in (("wider", {"hidden_size": 48}), ("deeper", {"num_hidden_layers": 3})):
        adapter, base = tmp_path / f"adapter-{name}", save_tiny_model(tmp_path / name)
        config = AutoConfig.from_pretrained(base)
        config.update(change)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        adapter.mkdir()
        for path in run.iterdir():
            if path.is_file():
                (adapter / path.name).write_bytes(path.read_bytes())
        lora.name_base(adapter, str(base), None)
        code, out = call(*SMALL, "--model", adapter, "--output", tmp_path / f"run-{name}")
        assert code == 2, out
        assert f"The adapter {adapter} does not fit {base}" in out


def test_prepared_data_that_is_damaged_is_refused_before_a_worker_starts(here, call, run, tmp_path):  # noqa: F811
    damaged = Path(shutil.copytree(record(run, "job.json")["data"]["directory"], tmp_path / "data"))
    rows = next((damaged / "rows").glob("*.arrow"))
    rows.write_bytes(rows.read_bytes()[:-100])
    code, out = call(damaged, "--processes", 1, "--output", tmp_path / "run", app=sft.app)
    assert code == 2, out
    assert f"{rows} is damaged" in out
    assert not (tmp_path / "run").exists()
