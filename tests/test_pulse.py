"""What a hung run tells: which process keeps the others waiting, where, and since when."""

import json
import time
from dataclasses import asdict

from opensloth.launch import pulse

TORCH = "/x/site-packages/torch/distributed/distributed_c10d.py"
OURS = "/home/me/opensloth/training/grpo.py"


def test_a_process_in_a_collective_is_named_with_who_called_it():
    frames = [(OURS, 12, "evaluate"), ("/x/site-packages/torch/distributed/c10d_logger.py", 3, "wrapper")]
    frames += [(TORCH, 900, "all_gather_object"), (TORCH, 700, "_wait")]
    assert pulse.collective(frames) == "all_gather_object"
    assert pulse.where(frames) == f"evaluate ({OURS}, line 12)"


def test_the_backward_pass_waits_for_others_too():
    assert pulse.collective([(OURS, 1, "training_step"), ("torch/autograd/graph.py", 2, "_engine_run_backward")])
    assert pulse.collective([(OURS, 1, "training_step"), ("my_rewards.py", 2, "score")]) is None


def note(directory, rank, since, collective, where="score (my_rewards.py, line 3)"):
    found = pulse.Pulse(rank, 7, since, since, 60, collective, where)
    pulse.path(directory, rank).write_text(json.dumps(asdict(found)))


def test_who_keeps_the_others_waiting_comes_first(tmp_path):
    now = time.time()
    note(tmp_path, 0, now - 58, "all_reduce", "training_step (grpo.py, line 9)")
    note(tmp_path, 1, now - 59, None)
    first, second = pulse.autopsy(tmp_path, 3, now)  # the third left no note
    assert first.startswith("Process 1 keeps them waiting in score (my_rewards.py, line 3), after step 7, since ")
    assert second.startswith("Process 0 waits for the others in all_reduce, called by training_step (grpo.py, line 9)")
    assert first.endswith("(59 s).")


def test_a_run_that_did_not_stand_still_needs_no_autopsy(tmp_path):
    note(tmp_path, 0, time.time() - 2, "all_reduce")
    pulse.path(tmp_path, 1).write_text("{half")
    assert pulse.autopsy(tmp_path, 2, time.time()) == []


def test_the_main_thread_is_noted_with_its_step(tmp_path):
    pulse.mark(5)
    watch = pulse.Watch(tmp_path, 3, 1)
    watch.start()
    give_up, found = time.monotonic() + 20, {"where": ""}
    while "test_the_main_thread_is_noted" not in found["where"]:
        assert time.monotonic() < give_up
        if pulse.path(tmp_path, 3).exists():
            found = json.loads(pulse.path(tmp_path, 3).read_text())
    watch.finish()
    assert not pulse.path(tmp_path, 3).exists()
    assert (found["rank"], found["step"], found["collective"]) == (3, 5, None)
