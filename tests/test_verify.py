"""`os-train verify`: N processes train what one does, and a wrong synchronization is found.

The processes are started once and train run after run, for starting them takes longer than training; one test takes the
real command. Faults are put into the trainers of those processes, run by run.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensloth.cli import program, train
from opensloth.cli.verify import tolerance_for
from opensloth.config.jobs import SftJob
from opensloth.config.run import LOSSES
from opensloth.config.verify import VerifySftJob
from opensloth.data.models.resolve import resolve_model
from opensloth.data.plan.schedule import schedule
from opensloth.data.prepared.directory import open_prepared
from opensloth.errors import BEYOND_TOLERANCE, USER_ERROR
from opensloth.evaluation import equality
from opensloth.launch import run_directory
from opensloth.launch.world import World
from opensloth.training import worker
from opensloth.training.grpo import group_trainer
from opensloth.training.sft import pack_trainer
from training_fixtures import as_a_worker, environment

MOST = 3  # processes
PATIENCE = 120  # seconds for one run


def mean_of_means(patch):
    """Each process takes the mean over its own trained tokens, and DDP the mean of these."""
    made = pack_trainer.trainer_class

    def trainer_class():
        class Wrong(made()):
            def training_step(self, model, inputs, num_items_in_batch=None):
                mine = sum(int((pack["labels"] != -100).sum()) for pack in inputs["packs"])
                own = {**inputs, "targets": max(1, mine * self.accelerator.num_processes)}
                return super().training_step(model, own, num_items_in_batch)

        return Wrong

    patch.setattr(pack_trainer, "trainer_class", trainer_class)


def dropped_gradient(patch, module=pack_trainer):
    """The last process takes part in the synchronization with gradients of 0."""
    made = module.trainer_class

    def trainer_class():
        class Wrong(made()):
            def training_step(self, model, inputs, num_items_in_batch=None):
                backward = self.accelerator.backward
                last = self.accelerator.process_index == self.accelerator.num_processes - 1
                self.accelerator.backward = lambda loss: backward(loss * 0 if last else loss)
                try:
                    return super().training_step(model, inputs, num_items_in_batch)
                finally:
                    self.accelerator.backward = backward

        return Wrong

    patch.setattr(module, "trainer_class", trainer_class)


def second_sharding(patch, module=pack_trainer):
    """accelerate divides each process's own steps among the processes once more."""
    made = module.trainer_class

    def trainer_class():
        class Wrong(made()):
            def get_train_dataloader(self):
                return self.accelerator.prepare(super().get_train_dataloader())

        return Wrong

    patch.setattr(module, "trainer_class", trainer_class)


def stray_weight(patch):
    """The last process changes a weight behind the others' backs, once the gradients were averaged."""
    made = pack_trainer.trainer_class

    def trainer_class():
        class Wrong(made()):
            def training_step(self, model, inputs, num_items_in_batch=None):
                loss = super().training_step(model, inputs, num_items_in_batch)
                if self.accelerator.process_index == self.accelerator.num_processes - 1:
                    weight = next(one for one in model.parameters() if one.requires_grad)
                    weight.data.view(-1)[0] += 1e-6  # far below the tolerance
                return loss

        return Wrong

    patch.setattr(pack_trainer, "trainer_class", trainer_class)


def mean_of_means_of_grpo(patch):
    """TRL's own mean over the tokens of each process's micro-batch, in place of the batch's."""
    weighted = group_trainer.weighted

    def equally(parts, batch, loss, processes):
        micro = weighted(parts, batch, loss, processes)
        batch["num_items_in_batch"] = batch["completion_mask"].sum() * processes
        return micro

    patch.setattr(group_trainer, "weighted", equally)


def dropped_gradient_of_grpo(patch):
    dropped_gradient(patch, group_trainer)


def second_sharding_of_grpo(patch):
    second_sharding(patch, group_trainer)


FAULTS = {
    fault.__name__: fault
    for fault in (
        mean_of_means,
        dropped_gradient,
        second_sharding,
        stray_weight,
        mean_of_means_of_grpo,
        dropped_gradient_of_grpo,
        second_sharding_of_grpo,
    )
}


def serve(rank):
    """One of the waiting processes: a run for each line of its input, told as JSON."""
    for line in sys.stdin:
        order = json.loads(line)
        place = {"RANK": rank, "WORLD_SIZE": order["processes"], "LOCAL_RANK": rank, "MASTER_PORT": order["port"]}
        os.environ.update({name: str(value) for name, value in place.items()})
        with pytest.MonkeyPatch.context() as patch, as_a_worker():
            if order["fault"]:
                FAULTS[order["fault"]](patch)
            worker.run(Path(order["run"]))
        print("DONE", flush=True)


class Pool:
    """Processes that wait for runs: in place of `run_workers`."""

    def __init__(self, directory):
        self.logs = [directory / f"{rank}.log" for rank in range(MOST)]
        place = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OPENSLOTH_TIMEOUT": "60"}
        self.processes = []
        for rank, path in enumerate(self.logs):
            with path.open("wb") as log:
                command = [sys.executable, __file__, str(rank)]
                self.processes.append(
                    subprocess.Popen(
                        command, env=environment(**place), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        self.fault = None

    def run(self, world, run_dir, *, max_restarts, timeout):
        from torch.distributed import TCPStore

        # of one process too, which a machine's other work would else make run with other threads than these
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        order = {"run": str(Path(run_dir).absolute()), "processes": world.processes, "port": store.port}
        order["fault"] = self.fault if world.processes > 1 else None
        done = [self.done(rank) for rank in range(world.processes)]
        for process in self.processes[: world.processes]:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        give_up = time.monotonic() + PATIENCE
        while any(self.done(rank) == done[rank] for rank in range(world.processes)):
            ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, self.logs[ended[0]].read_text()[-5000:]
            assert time.monotonic() < give_up, [log.read_text()[-2000:] for log in self.logs]
            time.sleep(0.05)

    def done(self, rank):
        return self.logs[rank].read_text().splitlines().count("DONE")

    def close(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pool")
    pool = Pool(directory)
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(pool):
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OPENSLOTH_CACHE", str(directory / "cache"))
        patch.setattr(run_directory, "run_workers", pool.run)
        yield pool


@pytest.fixture
def verify(pool, capsys):
    """`os-train verify ...`: exit code, what it found (as --json), and what it said."""

    def run(*arguments, fault=None):
        pool.fault = fault
        code = program.run(train.app, ["verify", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return run


@pytest.mark.parametrize("processes", [2, 3])
def test_sft_on_several_processes_is_that_on_one(verify, processes):
    code, found, err = verify("sft", "--processes", processes)
    assert code == 0, err
    assert found["equal"]
    assert found["faults"] == []
    assert found["steps"] == 4
    assert found["processes"] == processes
    assert found["processes_with_same_weights"] == processes
    differences = [found[name]["value"] for name in ("loss", "grad_norm", "eval_loss", "adapter")]
    assert max(differences) <= 2e-6, found  # a fifth of the tolerance: room for the rounding of other machines
    assert any(difference > 0 for difference in differences), "the runs are the same run"
    assert max(found["adapter"]["tensors"].values()) == found["adapter"]["value"]
    assert len(found["adapter"]["tensors"]) == 2 * 7 * 2  # two factors for each of seven layers in each of two blocks


@pytest.mark.parametrize("loss", LOSSES)
def test_grpo_on_two_processes_is_that_on_one(verify, loss):
    code, found, err = verify("grpo", "--loss", loss)
    assert code == 0, err
    assert max(found[name]["value"] for name in ("loss", "grad_norm", "adapter")) <= 5e-6, found
    assert found["completions"] == {"drawn": 3 * 12 * 4, "alike": found["completions"]["alike"], "stray": 0}
    assert found["completions"]["alike"] >= 3 * 12 * 4 - 2, "the draws are not a hash of their place"
    assert found["gradient_norms"][0] > 0.01


@pytest.mark.parametrize(
    ("fault", "method", "beyond"),
    [
        ("mean_of_means", "sft", "adapter"),
        ("dropped_gradient", "sft", "grad_norm"),
        ("second_sharding", "sft", "loss"),
        ("stray_weight", "sft", "1 of 2 processes ended with the weights of process 0"),
        ("mean_of_means_of_grpo", "grpo", "adapter"),
        ("dropped_gradient_of_grpo", "grpo", "grad_norm"),
        ("second_sharding_of_grpo", "grpo", "completions were drawn in one of the runs alone, or twice"),
    ],
)
def test_a_wrong_synchronization_is_found(verify, fault, method, beyond):
    code, found, err = verify(method, fault=fault)
    assert code == BEYOND_TOLERANCE == 4
    assert not found["equal"]
    assert any(beyond in sentence for sentence in found["faults"]), found["faults"]
    assert "2 processes do not train what one does" in err
    assert "The tolerance is 1e-05." in err


def test_in_16_bits_more_rounding_passes_but_not_a_lost_gradient(verify):
    code, found, err = verify("sft", "--dtype", "bfloat16")
    assert code == 0, err
    assert 1e-4 < found["adapter"]["value"] < found["tolerance"] == 0.02
    code, found, _ = verify("sft", "--dtype", "bfloat16", fault="dropped_gradient")
    assert code == BEYOND_TOLERANCE
    assert found["adapter"]["value"] > 0.2


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ({}, "cpu", 1e-5),
        ({}, "cuda:0", 1e-4),
        ({"dtype": "bfloat16"}, "cuda:0", 0.02),
        ({"dtype": "auto"}, "cpu", 0.02),
        ({"tolerance": 0.5}, "cuda:0", 0.5),
    ],
)
def test_the_tolerance_is_that_of_the_rounding(asked, device, expected):
    assert tolerance_for(VerifySftJob.model_validate(asked), World((device, device))) == expected


def test_the_job_accumulates_packs_and_holds_rows_out(verify, tmp_path):
    code, _, err = verify("sft", "--output", tmp_path / "kept")
    assert code == 0, err
    prepared = open_prepared(tmp_path / "kept" / "data")
    job = json.loads((tmp_path / "kept" / "several" / "job.json").read_text())["settings"]
    lengths = prepared.lengths[~prepared.is_eval]
    assert prepared.is_eval.any()
    assert len(set(lengths.tolist())) > 10
    micro_batches = (tmp_path / "kept" / "several" / "metrics.jsonl").read_text()
    assert '"eval_loss"' in micro_batches
    plan = schedule(prepared, SftJob.model_validate({n: e["value"] for n, e in job.items()}), seed=3407, processes=2)
    for step in range(4):
        parts = plan.micro_batches(step, job["pack_tokens"]["value"], 2)
        assert all(len(process) >= 2 for process in parts), "nothing accumulates"
        assert any(len(rows) >= 2 for process in parts for rows in process), "nothing is packed"
    code, _, err = verify("sft", "--output", tmp_path / "kept")
    assert code == USER_ERROR
    assert "is there already" in err


def test_a_job_without_gradients_proves_nothing(verify, tmp_path):
    same = tmp_path / "same.py"
    same.write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    code, found, err = verify("grpo", "--rewards", f"{same}:same", "--max-steps", 1)
    assert code == BEYOND_TOLERANCE
    assert found is None
    assert "Nothing was verified: the gradient norm is 0 in every step." in err


def test_the_command_starts_its_own_processes(tmp_path):
    command = [sys.executable, "-m", "opensloth.cli.train", "verify", "sft", "--max-steps", "1", "--tolerance", "1e-12"]
    more = environment(OPENSLOTH_CACHE=str(tmp_path))
    run = subprocess.run(command, cwd=tmp_path, env=more, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == BEYOND_TOLERANCE, run.stderr  # rounding alone is beyond this tolerance
    assert "on 2 of 2 processes, to the bit" in run.stdout
    assert "(step 1)" in run.stdout
    assert "lora_B.weight)" in run.stdout
    assert "The tolerance is 1e-12." in run.stderr


def metrics(directory, **figures):
    directory.mkdir()
    rows = [{"step": step + 1, **{name: values[step] for name, values in figures.items()}} for step in range(2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "result.json").write_text('{"processes_with_these_weights": 2}')
    save_file({"a": torch.ones(4), "b": torch.full((2,), 3.0)}, directory / "adapter_model.safetensors")
    return directory


def test_differences_are_told_with_their_step_and_tensor(tmp_path):
    one = metrics(tmp_path / "one", loss=[4.0, 0.5], grad_norm=[2.0, 0.01])
    two = metrics(tmp_path / "two", loss=[4.0, 0.75], grad_norm=[2.0, 0.02])
    save_file({"a": torch.ones(4), "b": torch.full((2,), 3.3)}, two / "adapter_model.safetensors")
    found = equality.compare(one, two, 2)
    assert found.figures["loss"] == (0.25, "step 2")  # of 1, because it is below
    assert found.figures["grad_norm"] == (pytest.approx(1.0), "step 2")
    assert found.adapter == (pytest.approx(0.1), "b")
    assert [fault.split(" by")[0] for fault in found.faults(0.5)] == ["grad_norm differs"]
    assert found.faults(2.0) == []


def test_what_is_missing_or_no_number_is_beyond_every_tolerance(tmp_path):
    one = metrics(tmp_path / "one", loss=[4.0, 0.5], grad_norm=[2.0, 0.01])
    two = metrics(tmp_path / "two", loss=[4.0, math.nan], grad_norm=[2.0, 0.01])
    save_file({"a": torch.ones(4)}, two / "adapter_model.safetensors")
    found = equality.compare(one, two, 3)
    assert found.figures["loss"] == (math.inf, "step 2")
    assert found.adapter == (math.inf, "b")
    assert len(found.faults(1e9)) == 3, "loss, adapter, and a process with other weights"


def test_the_tiny_model_is_made_once_and_is_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENSLOTH_CACHE", str(tmp_path / "one"))
    first = resolve_model("sample:tiny")
    made = (Path(first.base) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("sample:tiny") == first
    assert (Path(first.base) / "model.safetensors").stat().st_mtime_ns == made
    monkeypatch.setenv("OPENSLOTH_CACHE", str(tmp_path / "two"))
    again = Path(resolve_model("sample:tiny").base)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (Path(first.base) / name).read_bytes()


def test_one_process_proves_nothing(capsys):
    assert program.run(train.app, ["verify", "sft", "--processes", "1", "--dry-run"]) == USER_ERROR
    assert "One process is compared with several." in capsys.readouterr().err


if __name__ == "__main__":
    serve(int(sys.argv[1]))
