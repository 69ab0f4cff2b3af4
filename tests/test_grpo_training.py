"""GRPO end to end on a tiny model that answers at random between two answers."""

import functools
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl

from grpo_fixtures import (
    BATCH,
    MAX_NEW,
    PROBLEMS,
    adapter_bytes,
    begin,
    make_adapter,
    make_place,
    metrics,
    prepare,
    problem,
    record,
    relative_difference,
    rollouts,
    train,
    train_in_two_processes,
)
from opensloth.config.jobs import GrpoJob
from opensloth.config.run import LOSSES
from opensloth.data.prepared.directory import open_prepared
from opensloth.engine import lora, policy
from opensloth.rewards import choose
from opensloth.rewards.gold import FAILURES
from opensloth.rollout import generate as generate_module
from opensloth.rollout.generate import generate, writer_for
from opensloth.rollout.sampling import Noise, Sampling
from opensloth.training.callbacks import Metrics
from opensloth.training.grpo import group_trainer
from opensloth.training.grpo.advice import PATIENCE, Advice
from opensloth.training.grpo.run import held_out_prompts
from tiny import save_tiny_model
from training_fixtures import end

SAME = 1e-5
OWN = ("data", "--model", "model", *BATCH, "--rewards", "rewards.py:letters", "--processes", 1)
HELD = ("held", *BATCH, "--max-steps", 3, "--eval-steps", 2, "--beta", 0.05, "--processes", 1)
ONE_HELD = ("one-held", *BATCH, "--max-steps", 2, "--processes", 1)
TINY = ("--dtype", "float32", "--prompts-per-step", 2, "--group-size", 2, "--max-new", 3, "--processes", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, an adapter of it, data and a reward, which the runs of this module share."""
    directory = make_place(tmp_path_factory.mktemp("grpo"))
    make_adapter(directory)
    return directory


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def said(place):
    """What a run says that has the rewards of --task math, held-out prompts and a reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return train(*HELD, "--output", "run")


@pytest.fixture
def run(place, said):
    """The directory of that run."""
    return place / "run"


@pytest.fixture(scope="module")
def pair(place):
    """The same by two processes, with one held-out prompt too, and a run of two processes for each loss."""
    jobs = [(*OWN, "--max-steps", 2, "--loss", loss, "--output", f"pair-{loss}") for loss in LOSSES]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train_in_two_processes(*jobs, (*HELD, "--output", "pair-held"), (*ONE_HELD, "--output", "pair-one-held"))
    return place


@pytest.fixture
def stop_after(monkeypatch):
    """The run of this process is asked to stop while it logs a step."""
    on_log = Metrics.on_log

    def choose(step):
        def log_and_signal(self, args, state, *rest, **more):
            on_log(self, args, state, *rest, **more)
            if state.global_step == step and "loss" in more["logs"]:
                signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(Metrics, "on_log", log_and_signal)

    yield choose
    monkeypatch.undo()


@pytest.fixture
def stop_while(monkeypatch):
    """The run of this process is asked to stop as it writes the fifth token of completions that `which(noise)` picks.

    Returns the tokens that were begun when it was asked.
    """
    inner = group_trainer.generate

    def choose(which):
        asked = []

        def generate_and_signal(*arguments, noise, halt, **more):
            picked, tokens = not asked and which(noise), 0

            def counted():
                nonlocal tokens
                tokens += 1
                if picked and tokens == 5:
                    signal.raise_signal(signal.SIGUSR1)
                if picked and tokens >= 5:
                    asked.append(tokens)
                return halt()

            return inner(*arguments, noise=noise, halt=counted, **more)

        monkeypatch.setattr(group_trainer, "generate", generate_and_signal)
        return asked

    yield choose
    monkeypatch.undo()


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_neither_micro_batches_nor_processes_change_a_step(pair, loss):
    job = (*OWN, "--max-steps", 2, "--loss", loss)
    one = pair / f"one-{loss}"
    train(*job, "--output", one)
    train(*job, "--pack-tokens", 150, "--output", f"tokens-{loss}")
    train(*job, "--batch-size", 3, "--output", f"rows-{loss}")
    assert all(len(set(rollouts(one, step)["tokens"])) > 2 for step in (1, 2))
    for other in (pair / f"tokens-{loss}", pair / f"rows-{loss}", pair / f"pair-{loss}"):
        for step in (1, 2):
            assert rollouts(other, step)["completion"] == rollouts(one, step)["completion"]
            assert rollouts(other, step)["advantage"] == rollouts(one, step)["advantage"]
        for key in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
            found, expected = ([entry[key] for entry in metrics(run)] for run in (other, one))
            assert found == pytest.approx(expected, rel=SAME, abs=1e-6), key
        assert relative_difference(one, other) <= 1e-4, other


def by_trl(place, loss, scale, beta, updates, steps):
    """TRL's trainer as it comes, on the same prompts, completions and rewards. Returns its losses; saves to `trl`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prepared = open_prepared(place / "data")
    job = GrpoJob(data=place / "data")
    seed = int(prepared.manifest.options["seed"])
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = lora.attach(AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32), job, seed)
    rows = [prepared.rows.prompt(index) for index in range(PROBLEMS)]
    ids = {row.row_id: list(row.input_ids) for row in rows}
    asked = [
        row_id
        for step in range(1, steps + 1, updates)
        for row_id in rollouts(place / "run-of-ours", step)["row_id"][::4]
    ]
    batches = iter(range(steps))

    def roll_out(prompts, trainer):
        inputs = [ids[int(prompt)] for prompt in prompts]
        noise = Noise(seed, next(batches), tuple(range(len(inputs))))
        stops = [tokenizer.eos_token_id]
        found = generate(trainer.model, inputs, stops=stops, pad=0, max_new=MAX_NEW, sampling=Sampling(), noise=noise)
        return {
            "prompt_ids": inputs,
            "completion_ids": [one.ids for one in found],
            "logprobs": [one.logprobs for one in found],
        }

    def letters(completions, **_):
        return [len(text) / 10 + text.count("o") for text in completions]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=letters,
        rollout_func=roll_out,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": str(row_id)} for row_id in asked]),
        args=GRPOConfig(
            output_dir="trl",
            max_steps=steps,
            per_device_train_batch_size=24,
            steps_per_generation=1,
            num_iterations=updates,
            num_generations=4,
            max_completion_length=MAX_NEW,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.5,
            weight_decay=0.0,
            beta=beta,
            loss_type=loss,
            scale_rewards=scale,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    model.save_pretrained(place / "trl", selected_adapters=["default"])
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("loss", "scale", "beta", "updates"),
    [
        ("dapo", "group", 0.05, 1),
        ("dapo", "batch", 0.05, 2),
        ("grpo", "group", 0.0, 2),
        ("dr_grpo", "none", 0.0, 1),
        ("bnpo", "group", 0.0, 1),
    ],
)
def test_losses_and_adapter_are_those_of_trls_own_trainer(place, loss, scale, beta, updates):
    steps = 4 if updates == 2 else 3
    ours = place / "run-of-ours"
    ways = ("--loss", loss, "--beta", beta, "--updates-per-batch", updates, "--save-steps", 10)
    ways += ("--scale-rewards", scale) if scale == "batch" else ()  # the others are what auto chooses
    train(*OWN, "--max-steps", steps, *ways, "--force", "--output", ours)
    expected = by_trl(place, loss, scale, beta, updates, steps)
    assert len(set(expected)) == steps
    assert [entry["loss"] for entry in metrics(ours)] == pytest.approx(expected, abs=1e-5)
    assert relative_difference(place / "trl", ours) <= 1e-3


@pytest.mark.parametrize(("factor", "weight"), [(1.5, 1.5), (0.25, 0.25), (5.0, 2.0)])
def test_what_the_sampler_found_too_unlikely_weighs_more(here, monkeypatch, factor, weight):
    """A sampler whose probabilities are too small by a factor: each token's loss is multiplied by it, up to the cap."""

    def shifted(run_dir, rank, inner):
        def write(policy, *asked):
            tokens, logprobs = (inner or writer_for(policy, 1))(policy, *asked)
            return tokens, [[value - math.log(factor) for value in row] for row in logprobs]

        return write

    job = (*OWN, "--max-steps", 1, "--max-grad-norm", 100, "--force")
    train(*job, "--output", "exact")
    monkeypatch.setattr("opensloth.training.grpo.run.recorded", shifted)
    train(*job, "--batch-size", 5, "--output", "shifted")
    (exact,), (found,) = metrics(here / "exact"), metrics(here / "shifted")
    assert exact["importance/mean"] == 1
    assert exact["importance/capped"] == 0
    assert found["loss"] == pytest.approx(weight * exact["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(weight * exact["grad_norm"], rel=1e-4)
    assert found["importance/mean"] == pytest.approx(weight, rel=1e-4)
    assert found["importance/capped"] == (factor > weight)
    assert found["logp_gap/mean"] == pytest.approx(abs(math.log(factor)), rel=1e-3)


@pytest.mark.parametrize("updates", [1, 2])
def test_no_pass_is_spent_on_the_policy_before_an_update(here, monkeypatch, updates):
    """Its log-probabilities are those of the first update's own forward pass."""
    passes = []
    scores = policy.packed

    def counted(*asked, **more):
        passes.append(torch.is_grad_enabled())
        return scores(*asked, **more)

    monkeypatch.setattr(policy, "packed", counted)
    ways = ("--max-steps", 2, "--updates-per-batch", updates, "--save-steps", 10, "--pack-tokens", 100_000)
    train(*OWN, *ways, "--force", "--output", "passes")
    assert passes == [True, True]


def test_groups_without_a_spread_are_counted_whatever_advantages_are_divided_by(here):
    """Of two prompts one is rewarded alike for all completions, though the batch as a whole has a spread."""
    (here / "half.py").write_text(
        "def half(completions, row_id, completion_ids, **_):\n"
        "    place = {one: at for at, one in enumerate(dict.fromkeys(row_id))}\n"
        "    return [0.1 if place[one] else sum(ids) % 7 for one, ids in zip(row_id, completion_ids)]\n"
    )
    job = ("data", "--model", "model", *TINY[:2], "--prompts-per-step", 2, "--group-size", 4, "--max-new", 8)
    train(
        *job,
        "--processes",
        1,
        "--rewards",
        "half.py:half",
        "--max-steps",
        2,
        "--scale-rewards",
        "batch",
        "--output",
        "half",
    )
    for entry in metrics(here / "half"):
        assert entry["frac_reward_zero_std"] == 0.5
        advantages = rollouts(here / "half", entry["step"])["advantage"]
        assert sum(abs(value) < 1e-3 for value in advantages) == 4


# --- stopping and going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ways", "asked", "stopped", "steps"),
    [
        (("--model", "adapter", "--beta", 0.1), 1, 1, 4),
        (("--model", "adapter", "--updates-per-batch", 2, "--save-steps", 2, "--beta", 0.1), 1, 2, 6),
        (("--full-finetuning", "--beta", 0.1), 1, 1, 3),
    ],
    ids=["reference", "updates", "full"],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(here, stop_after, ways, asked, stopped, steps):
    job = (*OWN, "--max-steps", steps, *ways, "--force")
    train(*job, "--output", "whole")
    stop_after(asked)
    said = train(*job, "--output", "cut", expect=75)
    assert f"Stopped by SIGUSR1 after step {stopped}, which is saved." in said
    assert not (here / "cut" / "result.json").exists()
    stop_after(None)
    said = train(*job[:-1], "--output", "cut")
    assert f"checkpoints/checkpoint-{stopped}" in said
    name = "model.safetensors" if "--full-finetuning" in ways else "adapter_model.safetensors"
    assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes()
    files = sorted(path.name for path in (here / "whole" / "rollouts").iterdir())
    assert sorted(path.name for path in (here / "cut" / "rollouts").iterdir()) == files
    updates = 2 if "--updates-per-batch" in ways else 1
    assert files == [f"step_{step}.parquet" for step in range(1, steps + 1, updates)]
    for step in range(1, steps + 1, updates):
        assert rollouts(here / "cut", step) == rollouts(here / "whole", step)
    for key in ("loss", "kl", "reward"):
        logged = [[entry[key] for entry in metrics(here / name, key)] for name in ("cut", "whole")]
        assert logged[0] == logged[1] != [], key


@pytest.mark.parametrize(
    ("writer", "ways", "batch", "kept"),
    [
        ("ours", (), 2, 2),
        ("graph", ("--rollout", "graph", "--updates-per-batch", 2, "--save-steps", 2), 1, 2),
        ("transformers", (), 0, 0),
    ],
)
def test_completions_in_flight_are_dropped_and_drawn_again(here, stop_while, monkeypatch, writer, ways, batch, kept):
    if writer == "transformers":
        monkeypatch.setattr(generate_module, "why_not", lambda policy, longest: "as this test wants it")
    job = (*OWN, "--max-steps", 4, *ways, "--force")
    whole, cut = here / "flight-whole", here / "flight-cut"
    train(*job, "--output", whole)
    asked = stop_while(lambda noise: noise is not None and noise.step == batch)
    said = train(*job, "--output", cut, expect=75)
    assert asked == [5]  # at the fifth token, and no token more was written
    assert f"Stopped by SIGUSR1 {f'after step {kept}, which is saved' if kept else 'before the first step'}" in said
    assert [path.name for path in (cut / "checkpoints").glob("*")] == ([f"checkpoint-{kept}"] if kept else [])
    said = train(*job[:-1], "--output", cut)
    assert (f"checkpoints/checkpoint-{kept}" in said) == (kept > 0)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert [entry["loss"] for entry in metrics(cut)] == [entry["loss"] for entry in metrics(whole)]


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_dropped_evaluation_is_made_up_for(run, here, stop_while, at):
    """Before the first step, between two, and after the last one."""
    cut = here / f"held-cut-{at}"
    evaluations = iter((0, 2, 3))
    asked = stop_while(lambda noise: noise is None and next(evaluations) == at)
    train(*HELD, "--output", cut, expect=75)
    assert asked == [5]
    train(*HELD, "--output", cut)
    assert adapter_bytes(cut) == adapter_bytes(run)
    for key in ("loss", "eval_reward", "eval_pass_at_1"):
        found, expected = ([(entry["step"], entry[key]) for entry in metrics(at, key)] for at in (cut, run))
        assert found == expected, key
    assert record(cut / "best", "best.json") == record(run / "best", "best.json")
    events = EventAccumulator(str(cut / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/reward")] == [0, 2, 3]


# --- where a run begins ------------------------------------------------------------------------------------------


def test_from_an_adapter_the_reference_is_that_adapter_and_what_is_saved_is_plain(here):
    said = train(*OWN, "--model", "adapter", "--max-steps", 3, "--beta", 0.1, "--save-steps", 2, "--output", "from-sft")
    run = here / "from-sft"
    assert "with its own r=4 and alpha=12" in said
    config = record(run, "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["base_model_name_or_path"] == str(here / "model")
    kl = [entry["kl"] for entry in metrics(run)]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert 0 < kl[1] < kl[2]
    assert [path for path in run.rglob("*") if path.name == "ref"] == []
    weights, start = (load_file(at / "adapter_model.safetensors") for at in (run, here / "adapter"))
    assert weights.keys() == start.keys()
    assert all(bool((weights[name] != start[name]).any()) for name in start)

    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(run, is_trainable=True)
    assert lora.weights_hash(model) == record(run, "result.json")["weights_sha256"]
    assert AutoTokenizer.from_pretrained(run).chat_template
    assert record(run, "prompt.json") == record(here / "adapter", "prompt.json")


def test_a_new_adapter_begins_as_the_base_model(run):
    config = record(run, "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    kl = [entry["kl"] for entry in metrics(run)]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[1] > 0


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_where_all_weights_train_the_reference_is_the_model_as_it_was(here, arch):
    """Also for one that caps its attention logits, which the reference must do as well."""
    model = "model" if arch == "llama" else save_tiny_model(here / arch, arch)
    if arch == "gemma2":  # a cap that matters for a model as small as this
        config = record(model, "config.json") | {"attn_logit_softcapping": 0.01}
        (model / "config.json").write_text(json.dumps(config))
        weights = load_file(model / "model.safetensors")
        weights = {name: tensor * (300 if "q_proj" in name else 1) for name, tensor in weights.items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ways = ("--full-finetuning", "--beta", 0.1, "--max-steps", 2, "--output", f"full-{arch}")
    train(*OWN, "--model", model, *ways)
    kl = [entry["kl"] for entry in metrics(here / f"full-{arch}")]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[1] > 1e-6
    trained = AutoModelForCausalLM.from_pretrained(here / f"full-{arch}").state_dict()
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(bool((trained[name] != base[name]).any()) for name in base if "rotary" not in name)
    assert not (here / f"full-{arch}" / "adapter_config.json").exists()


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_every_completion_is_written_with_its_scores(run, here):
    for step in (1, 2, 3):
        table = rollouts(run, step)
        assert {len(column) for column in table.values()} == {24}
        assert set(table) == {
            *("row_id", "question", "completion", "answer", "tokens", "cut", "in_format", "right", "advantage"),
            *(f"reward_{name}" for name in ("math_format", "math_answer", "math_number", "demo_reward")),
        }
        assert len(set(table["row_id"])) == 6
        for at in range(24):
            row = problem(table["row_id"][at])
            assert table["question"][at].strip() == row["problem"].strip()
            assert table["answer"][at] == row["answer"]
            assert table["right"][at] == (
                table["in_format"][at] and table["completion"][at].endswith(f">{row['answer']}</SOLUTION>")
            )
            assert table["cut"][at] <= (table["tokens"][at] == MAX_NEW)
            assert table["right"][at] <= (table["reward_math_answer"][at] == 5), table["completion"][at]
        for at in range(0, 24, 4):
            assert sum(table["advantage"][at : at + 4]) == pytest.approx(0, abs=1e-5)
    assert len(list((run / "rollouts").iterdir())) == 3


def test_the_metrics_say_what_happens(run):
    assert [entry["step"] for entry in metrics(run)] == [1, 2, 3]
    table = rollouts(run, 1)
    first = metrics(run)[0]
    assert first["pass_rate"] == pytest.approx(sum(table["right"]) / 24)
    assert 0 < first["pass_rate"] < 1
    assert first["completions/clipped_ratio"] == pytest.approx(sum(table["cut"]) / 24)
    assert first["completions/mean_length"] == pytest.approx(sum(table["tokens"]) / 24)
    for name in ("math_format", "math_answer", "math_number"):
        scores = torch.tensor(table[f"reward_{name}"])
        assert first[f"rewards/{name}/mean"] == pytest.approx(float(scores.mean()), abs=1e-5)
        assert first[f"rewards/{name}/std"] == pytest.approx(float(scores.std()), abs=1e-5)
    for entry in metrics(run):
        assert 0 <= entry["frac_reward_zero_std"] <= 1
        assert entry["logp_gap/max"] < 1e-4
        assert entry["logp_gap/mean"] <= entry["logp_gap/max"]
        assert 0 < entry["entropy"] < math.log(500)
        assert all(entry[f"seconds/{name}"] > 0 for name in ("rollout", "rewards", "train"))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = {f"train/{name}" for name in first if name not in ("step",)}
    assert shown <= set(events.Tags()["scalars"])
    assert {"train/kl", "train/reward", "eval/pass_at_1", "eval/reward"} <= set(events.Tags()["scalars"])


def test_a_step_is_divided_into_what_its_time_went_to(run, pair):
    parts = [f"seconds/{name}" for name in ("rollout", "wait", "rewards", "train", "other")]
    for directory in (run, pair / "pair-held"):
        for entry in metrics(directory):
            assert sum(entry[part] for part in parts) == pytest.approx(entry["seconds/step"], rel=0.02)
            assert 0 <= entry["padding"] < 1
            assert 0 < entry["unfilled"] < 1
    for entry in metrics(run):
        assert entry["imbalance"] == 1
        assert entry["seconds/wait"] == entry["seconds/sync"] == entry["seconds/communication"] == 0
    two = metrics(pair / "pair-held")
    assert all(1 <= entry["imbalance"] < 2 for entry in two)
    assert any(entry["imbalance"] > 1 for entry in two)
    assert all(0 < entry["seconds/sync"] < entry["seconds/train"] for entry in two)
    assert any(entry["seconds/wait"] > 0 for entry in two)
    one, other = (record(directory, "result.json")["per_process"] for directory in (run, pair / "pair-held"))
    assert sum(one["tokens"]) == sum(other["tokens"])  # the same completions, each prompt once for its group


def test_time_is_told_per_step_however_often_it_is_logged(here):
    train(*OWN, "--max-steps", 4, "--updates-per-batch", 2, "--save-steps", 2, "--logging-steps", 4, "--output", "four")
    *_, last = metrics(here / "four")
    assert last["seconds/rollout"] < last["seconds/step"]
    parts = sum(last[f"seconds/{name}"] for name in ("rollout", "wait", "rewards", "train", "other"))
    assert parts == pytest.approx(last["seconds/step"], rel=0.02)


def test_the_person_reads_of_rewards_and_held_out_problems(said):
    assert "step 3/3  reward " in said
    assert "held out: " in said
    for noise in ("{'loss'", "train_runtime", "it/s]", "experimental"):
        assert noise not in said, noise


# --- held-out problems -------------------------------------------------------------------------------------------


def test_held_out_problems_are_answered_before_between_and_after_the_steps(run):
    looks = metrics(run, "eval_pass_at_1")
    assert [entry["step"] for entry in looks] == [0, 2, 3]
    assert all(0 < entry["eval_pass_at_1"] < 1 for entry in looks)  # the answer is 1 or 2, and the model says one
    best = record(run / "best", "best.json")
    assert best["pass_at_1"] == max(entry["eval_pass_at_1"] for entry in looks)
    assert best["pass_at_1"] == next(e["eval_pass_at_1"] for e in looks if e["step"] == best["step"])
    assert (run / "best" / "adapter_model.safetensors").is_file()
    assert record(run, "result.json")["best_eval_pass_at_1"] == best["pass_at_1"]
    trained = {row_id for step in (1, 2, 3) for row_id in rollouts(run, step)["row_id"]}
    prepared = open_prepared(run.parent / "held")
    assert trained.isdisjoint(prepared.rows.prompt(int(row)).row_id for row in prepared.is_eval.nonzero()[0])


def test_of_equally_many_right_answers_the_higher_reward_decides(here):
    """None is right within five tokens, so that only the reward tells the adapters apart."""
    job = ("held", *BATCH, "--max-new", 5, "--rewards", "rewards.py:letters", "--processes", 1, "--lr", 0.02)
    said = train(*job, "--max-steps", 4, "--eval-steps", 1, "--output", "tied")
    looks = metrics(here / "tied", "eval_reward")
    assert {entry["eval_pass_at_1"] for entry in looks} == {0.0}
    most = max(entry["eval_reward"] for entry in looks)
    assert most > looks[0]["eval_reward"]
    best = record(here / "tied" / "best", "best.json")
    assert best["reward"] == most
    assert best["step"] == next(entry["step"] for entry in looks if entry["eval_reward"] == most)
    assert f"held out: 0.0% right, 0.0% in the format, reward {most:.3f}" in said


def test_two_processes_find_what_one_finds(run, here, pair):
    train(*ONE_HELD, "--output", "one-one-held")
    for one, two in ((run, "pair-held"), (here / "one-one-held", "pair-one-held")):
        for key in ("eval_pass_at_1", "eval_reward", "eval_mean_length", "eval_format_rate"):
            found, expected = ([entry[key] for entry in metrics(at, key)] for at in (pair / two, one))
            assert found == pytest.approx(expected), key
            assert len(found) >= 2
        for key in ("loss", "pass_rate", "reward", "frac_reward_zero_std"):
            found, expected = ([entry[key] for entry in metrics(at)] for at in (pair / two, one))
            assert found == pytest.approx(expected, abs=1e-5), key
        assert record(pair / two / "best", "best.json") == pytest.approx(record(one / "best", "best.json"))


def test_a_reward_gets_the_same_columns_of_held_out_problems(here):
    (here / "wide.py").write_text(
        "def wide(prompts, completions, completion_ids, answer, level, row_id, trainer_state, log_metric, log_extra):\n"
        "    assert len({len(x) for x in (prompts, completions, completion_ids, answer, level, row_id)}) == 1\n"
        "    assert [level_ for level_ in level] == [row % 3 for row in row_id]\n"
        "    log_metric('seen', trainer_state.global_step)\n"
        "    log_extra('first', [ids[0] for ids in completion_ids])\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    train(*HELD, "--rewards", "wide.py:wide", "--max-steps", 1, "--output", "wide")
    assert [entry["step"] for entry in metrics(here / "wide", "eval_reward")] == [0, 1]
    assert [entry["seen"] for entry in metrics(here / "wide")] == [0]


def test_rows_whose_own_answer_is_misjudged_are_not_trained_on(here):
    rows = [problem(number) | ({"answer": "17 </SOLUTION> 18"} if number in (2, 5) else {}) for number in range(8)]
    (here / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("gold.jsonl", "gold")
    train("gold", *TINY, "--epochs", 2, "--output", "without")
    files = (here / "without" / "rollouts").iterdir()
    asked = [
        row_id for path in files for row_id in rollouts(here / "without", path.stem.removeprefix("step_"))["row_id"]
    ]
    assert {row_id: asked.count(row_id) for row_id in asked} == dict.fromkeys((0, 1, 3, 4, 6, 7), 4)


def test_misjudged_rows_are_no_measure_either(here, tmp_path):
    prepared = open_prepared(here / "held")
    first, *others = held_out_prompts(tmp_path, prepared)
    (tmp_path / FAILURES).write_text(json.dumps({"row_id": first.row_id}) + "\n")
    assert held_out_prompts(tmp_path, prepared) == others


def test_a_fault_is_told_with_the_rows_of_its_own_step():
    """Losses are looked at when they are logged, which may be some steps later."""
    prompts = [{"prompts": [SimpleNamespace(row_id=row) for row in rows]} for rows in ([7, 7, 3, 3], [5, 5, 9, 9])]
    trainer = SimpleNamespace(run=SimpleNamespace(prompts=prompts), state=SimpleNamespace(global_step=2))
    fault = group_trainer.trainer_class().describe_fault(trainer, (0, [1, 2]), math.inf)
    assert (fault.step, fault.row_ids) == (1, [3, 7])


def test_a_model_whose_logits_are_no_numbers_ends_the_run(here, tmp_path):
    save_tiny_model(tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    out = train("data", "--model", tmp_path / "broken", *TINY, "--output", tmp_path / "run", expect=3)
    assert "After step 0: the model's logits are not finite" in out


def test_recorded_steps_train_as_generate_does(here):
    job = (*OWN, "--max-steps", 2)
    train(*job, "--rollout", "graph", "--output", "recorded")
    train(*job, "--rollout", "generate", "--output", "plain")
    assert rollouts(here / "recorded", 1)["completion"] == rollouts(here / "plain", 1)["completion"]
    assert all(entry["logp_gap/max"] < 1e-4 for entry in metrics(here / "recorded"))  # also of a trained adapter


def test_a_stop_token_that_is_an_ordinary_one_is_judged_by_nobody(here):
    """Rewards, verdicts and the record see the same text: without what ended it."""
    (here / "lengths.py").write_text(
        "def lengths(completions, **_):\n    return [float(len(turns[0]['content'])) for turns in completions]\n"
    )
    job = ("data", "--model", "model", *BATCH, "--rewards", "lengths.py:lengths", "--processes", 1)
    train(*job, "--max-steps", 1, "--stop", "1", "--output", "ordinary")
    found = rollouts(here / "ordinary", 1)
    assert any(text.endswith("<SOLUTION>") for text in found["completion"])
    assert found["reward_lengths"] == [float(len(text)) for text in found["completion"]]


def test_a_reward_gets_no_more_held_out_completions_than_in_training(here):
    (here / "few.py").write_text(
        "def few(completions, **_):\n    return [float(len(completions))] * len(completions)\n"
    )
    job = ("held", *TINY, "--prompts-per-step", 1, "--max-steps", 1, "--rewards", "few.py:few")
    train(*job, "--output", "few")
    assert metrics(here / "few", "eval_reward")[0]["eval_reward"] == pytest.approx(2)  # 6 problems, 2 a call


def test_rows_may_have_different_columns(here):
    rows = [problem(number) | ({"hint": number} if number % 2 else {}) for number in range(4)]
    (here / "ragged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("ragged.jsonl", "ragged")
    (here / "hints.py").write_text("def hints(completions, hint, **_):\n    return [x and float(x) for x in hint]\n")
    train("ragged", *TINY, "--rewards", "hints.py:hints", "--epochs", 1, "--output", "hinted")
    for step in (1, 2):
        table = rollouts(here / "hinted", step)
        for row_id, score in zip(table["row_id"], table["reward_hints"], strict=True):
            assert score == row_id if row_id % 2 else math.isnan(score)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [0.0] * (len(completions) - 1)", "returned 3 scores for 4 completions"),
        ("return [float('nan')] * len(completions)", "returned nan for row"),
        ("return ['good'] * len(completions)", "returned 'good' for row"),
        ("return 'good'", "returned str, not a list"),
        ("while True: pass", "took longer than 0.3 seconds"),
    ],
)
def test_a_reward_that_gives_no_scores_ends_the_run_with_its_place(here, monkeypatch, tmp_path, body, says):
    monkeypatch.setattr(choose, "load", functools.partial(choose.load, limit=0.3))
    (tmp_path / "bad.py").write_text(f"\n\ndef bad(completions, **_):\n    {body}\n")
    job = ("data", *TINY, "--max-steps", 2, "--rewards", f"{tmp_path / 'bad.py'}:bad")
    said = train(*job, "--output", tmp_path / "run", expect=3)
    error = said[said.index("error:") :]
    assert says in error
    assert "bad.py, line " in error
    assert "row " in error
    assert "Traceback" not in error


def test_a_reward_that_raises_on_one_process_ends_all_of_them(here):
    (here / "raising.py").write_text(
        "def raising(completions, row_id, trainer_state, **_):\n"
        "    return [1 / (row + trainer_state.global_step) for row in row_id]\n"
    )
    rows = [problem(number) for number in range(2)]
    (here / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("two.jsonl", "two-rows")
    job = ("two-rows", *TINY, "--processes", 2, "--max-steps", 2, "--rewards", "raising.py:raising")
    code, out = end(begin(*job, "--output", "raised"))
    assert code == 3, out
    error = out[out.index("error:") :]
    assert "The reward raising failed: " in error
    assert "raising.py, line 2" in error
    assert "row 0 (" in error
    assert "ZeroDivisionError" in error


def test_a_completion_that_no_reward_can_judge_moves_nothing_though_demo_reward_says_0(here):
    (here / "silent.py").write_text(
        "def silent(completions, **_):\n    return [None if i % 2 else float(i) for i in range(len(completions))]\n"
    )
    job = (*OWN[:-4], "--rewards", "silent.py:silent,demo_reward", "--processes", 1, "--max-steps", 1)
    train(*job, "--output", "silent")
    found = rollouts(here / "silent", 1)
    assert all(math.isnan(score) for score in found["reward_silent"][1::2])
    assert not any(found["advantage"][1::2])
    assert any(found["advantage"][::2])


# --- advice ------------------------------------------------------------------------------------------------------


def test_a_run_that_learns_nothing_says_what_to_change_and_says_it_once(here, tmp_path):
    save_tiny_model(tmp_path / "random")
    (tmp_path / "flat.py").write_text("def flat(completions, **_):\n    return [1.0] * len(completions)\n")
    job = ("data", *TINY, "--model", tmp_path / "random", "--rewards", f"{tmp_path / 'flat.py'}:flat", "--lr", 1e-9)
    steps = PATIENCE + 2
    said = train(*job, "--max-steps", steps, "--output", tmp_path / "warned")
    for words in ("reach --max-new 3", "no group had a spread of rewards"):
        assert said.count(words) == 1, words
    assert "No completion of the first batch is right" not in said  # no reward asks for that
    assert record(tmp_path / "warned", "result.json")["steps"] == steps

    ways = ("--zero-signal", "stop", "--updates-per-batch", 2, "--save-steps", 100)
    last = 2 * PATIENCE  # two steps on each batch, and a run ends between batches
    said = train(*job, *ways, "--max-steps", last + 2, "--output", tmp_path / "stopped", expect=2)
    assert "no group had a spread of rewards" in said[said.index("error:") :]
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == [f"checkpoint-{last}"]
    assert not (tmp_path / "stopped" / "result.json").exists()


def advised(logs, capsys, *, steps=1, stop=False, judges=True):
    """What is said of `steps` logs with these figures."""
    advice = Advice(stop=stop, speaks=True, judges=judges, max_new=64, every=1)
    control = TrainerControl()
    for step in range(1, steps + 1):
        state = SimpleNamespace(global_step=step, max_steps=100)
        advice.on_log(SimpleNamespace(logging_steps=1), state, control, {"frac_reward_zero_std": 0.0, **logs})
    out = capsys.readouterr()
    return out.out + out.err, control.should_training_stop


def test_logs_without_a_spread_are_counted_on_where_a_run_goes_on():
    advice = Advice(stop=True, speaks=False, judges=True, max_new=64, every=1)
    before = [{"frac_reward_zero_std": share} for share in (1.0, 0.5, *[1.0] * (PATIENCE - 1))]
    control, args = TrainerControl(), SimpleNamespace(logging_steps=1)
    state = SimpleNamespace(global_step=len(before), max_steps=100, log_history=[*before, {"eval_reward": 1.0}])
    advice.on_train_begin(args, state, control)
    assert advice.flat == PATIENCE - 1
    advice.on_log(args, state, control, {"frac_reward_zero_std": 1.0})
    assert control.should_training_stop


def test_problems_that_are_all_solved_are_called_so(capsys):
    said, _ = advised({"pass_rate": 1.0}, capsys, steps=3)
    assert said.count("have nothing to teach") == 1
    assert advised({"pass_rate": 0.5, "completions/clipped_ratio": 0.5}, capsys, steps=3)[0] == ""


@pytest.mark.parametrize(
    ("rate", "words"), [(0.0, "No completion of the first"), (1.0, "Every completion of the first")]
)
def test_how_many_answers_are_right_does_not_matter_where_that_is_not_rewarded(rate, words, capsys):
    assert advised({"pass_rate": rate}, capsys, steps=2)[0].count(words) == 1
    assert advised({"pass_rate": rate}, capsys, judges=False)[0] == ""


def test_without_a_spread_the_way_out_depends_on_the_level(capsys):
    flat = {"frac_reward_zero_std": 1.0}
    assert advised(flat, capsys, steps=PATIENCE - 1, stop=True) == ("", False)
    said, stopped = advised({**flat, "pass_rate": 0.9}, capsys, steps=PATIENCE, stop=True)
    assert ("take harder problems" in said, stopped) == (True, True)
    said, stopped = advised({**flat, "pass_rate": 0.1}, capsys, steps=PATIENCE)
    assert ("take easier problems" in said, stopped) == (True, False)
