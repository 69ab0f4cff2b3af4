"""What the tests of GRPO share: a model that answers at random between two answers, its data, and ways to train it."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from opensloth.cli import data, grpo, program
from opensloth.data.prepared.directory import open_prepared
from opensloth.launch import run_directory
from opensloth.training import worker
from tiny import save_tiny_model, tiny_tokenizer
from training_fixtures import as_a_worker, environment, in_this_process

PROBLEMS = 24
MAX_NEW = 18
# one batch of 6 prompts x 4 completions
BATCH = ("--dtype", "float32", "--prompts-per-step", 6, "--group-size", 4, "--max-new", MAX_NEW, "--lr", 1e-3)
LETTERS = '''
def letters(completions, **_):
    """Long completions are better, and some letters: each group has a spread."""
    return [len(turns[-1]["content"]) / 10 + turns[-1]["content"].count("o") for turns in completions]
'''


def problem(number):
    return {"problem": f"What is {number}? " + "Think well. " * (number % 5), "answer": str(1 + number % 2)}


def prepare(rows, output, *arguments):
    """`os-data --method grpo` in the current directory."""
    command = [rows, "--model", "model", "--workers", "1", "--method", "grpo", "--output", output]
    command += ["--chat-template", "reasoning", "--system", "Answer.", *arguments]
    assert program.run(data.app, [str(word) for word in command]) == 0


def make_place(directory):
    """A directory with `model`, data of it (`data`, `held` with 6 held-out rows, `one-held`) and `rewards.py`."""
    save_tiny_model(directory / "model")
    rows = [json.dumps(problem(number) | {"level": number % 3}) + "\n" for number in range(PROBLEMS)]
    (directory / "rows.jsonl").write_text("".join(rows))
    (directory / "rewards.py").write_text(LETTERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        prepare("rows.jsonl", "data")
        prepare("rows.jsonl", "held", "--eval-fraction", 0.25)
        prepare("rows.jsonl", "one-held", "--eval-fraction", 0.04)
    learn_to_answer(directory)
    return directory


def learn_to_answer(directory):
    """Teach the model the format, with 1 or 2 as the answer and workings of uneven length, whatever is asked."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    prepared = open_prepared(directory / "data")
    rows = []
    for number in range(PROBLEMS):
        prompt = list(prepared.rows.prompt(number).input_ids)
        for choice in range(6):
            text = " So." * (choice // 2) + f"<end_working_out><SOLUTION>{1 + choice % 2}</SOLUTION><|im_end|>"
            answer = tokenizer(text).input_ids
            assert len(answer) <= MAX_NEW, (len(answer), text)
            rows.append((prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in rows])
    at = torch.arange(longest)
    trained = torch.stack([(at >= len(p)) & (at < len(p) + len(a)) for p, a in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = torch.randperm(len(rows), generator=shuffle)[:24]
        logits = model(input_ids=ids[batch]).logits[:, :-1]
        keep = trained[batch][:, 1:]
        torch.nn.functional.cross_entropy(logits[keep], ids[batch][:, 1:][keep]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory / "model")


def make_adapter(directory, name="adapter", rank=4, alpha=12):
    """An adapter of the model as SFT leaves it; its second factor is not 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "down_proj"]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory / name)
    tiny_tokenizer().save_pretrained(directory / name)
    open_prepared(directory / "data").contract.save(directory / name / "prompt.json")
    return directory / name


def train(*arguments, expect=0):
    """`os-grpo ...` whose worker runs in this process. Returns what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(run_directory, "run_workers", in_this_process)
        code = program.run(grpo.app, [str(word) for word in arguments])
    assert code == expect, out.getvalue()
    return out.getvalue()


RECORDS = "RECORDS_PACKS"  # in the environment of `train_in_two_processes`


def record_packs(patch):
    """Packs are filled up and recorded, though this is a CPU: a recording is the work done again there."""
    from opensloth.engine import choose

    patch.setattr(choose, "may_record", lambda *_: choose.RECORDED)
    patch.setattr(choose, "largest_recorded", lambda shape, tokens, *_, **__: tokens)


def replays_of(patch):
    """A list that gets an entry for each pack that goes through recordings."""
    from opensloth.engine.graphed import Passes

    done, replay = [], Passes.__call__
    patch.setattr(Passes, "__call__", lambda self, inputs: done.append(self) or replay(self, inputs))
    return done


def train_in_two_processes(*jobs, **variables):
    """Each of the jobs (arguments of `os-grpo`) by the same two processes, for starting them takes long."""
    from torch.distributed import TCPStore

    runs = []

    def note(world, run_dir, **_):
        assert world.processes == 2
        runs.append(Path(run_dir).absolute())
        (Path(run_dir) / "result.json").write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(run_directory, "run_workers", note)
        for job in jobs:
            with_two = [*job[: job.index("--processes") + 1], 2, *job[job.index("--processes") + 2 :]]
            assert program.run(grpo.app, [str(word) for word in with_two]) == 0
    for run in runs:
        (run / "result.json").unlink()
    # no port is free until it is taken: each run's processes meet at a store that is there already
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in runs]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place["OPENSLOTH_TIMEOUT"] = "60"
    command = [sys.executable, __file__, *(f"{store.port}:{run}" for store, run in zip(stores, runs, strict=True))]
    processes = [
        subprocess.Popen(
            command,
            env=environment(**place, **variables, RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0, out
    finally:
        for process in processes:
            process.kill()


def begin(*arguments):
    """Start the real `os-grpo` in the current directory; `training_fixtures.end` waits for it."""
    command = [sys.executable, "-m", "opensloth.cli.grpo", *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def metrics(directory, key="loss"):
    """The lines of metrics.jsonl that hold `key`."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if key in entry]


def record(directory, name):
    return json.loads((directory / name).read_text())


def rollouts(directory, step):
    return pq.read_table(directory / "rollouts" / f"step_{step}.parquet").to_pydict()


def adapter_bytes(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def relative_difference(one, other):
    """How far apart two new adapters are, as a share of how far the second factors have moved from 0 (2-norms).

    Not the largest difference: Adam makes whole steps of gradients that are almost 0, whatever their sign.
    """
    first, second = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    assert first.keys() == second.keys()
    moved = sum(float(tensor.square().sum()) for name, tensor in first.items() if "lora_B" in name)
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return math.sqrt(apart / moved)


if __name__ == "__main__":  # one of the processes of `train_in_two_processes`
    for port, run in (word.split(":", 1) for word in sys.argv[1:]):
        os.environ["MASTER_PORT"] = port
        with as_a_worker(), pytest.MonkeyPatch.context() as patch_:
            replays = replays_of(patch_)
            if RECORDS in os.environ:
                record_packs(patch_)
            worker.run(Path(run))
            assert bool(replays) == (RECORDS in os.environ)
