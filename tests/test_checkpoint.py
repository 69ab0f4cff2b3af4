"""Checkpoints are complete or they do not exist."""

import pytest
import torch
from safetensors.torch import save_file

from opensloth.errors import UserError
from opensloth.training.checkpoint import CONTENTS, STAGING, STATE, complete, publish, recover, seal, to_resume

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", STATE, "rng_state_1.pth", "scaler.pt", CONTENTS)


def write(directory, without=None, cut=None):
    """A checkpoint as a run leaves it, but for one file that is missing or ends too early."""
    directory.mkdir(parents=True)
    save_file({"weight": torch.ones(8)}, directory / FILES[0])
    torch.save({"step": 1}, directory / FILES[1])
    torch.save({"step": 1}, directory / FILES[2])
    for name in FILES[4:6]:
        torch.save({"step": 1}, directory / name)
    (directory / STATE).write_text('{"global_step": 1}')
    seal(directory)
    if without:
        (directory / without).unlink()
    if cut:
        whole = (directory / cut).read_bytes()
        (directory / cut).write_bytes(whole[:-3])
    return directory


def names(found):
    return [path.name for path in found]


def test_checkpoints_are_ordered_by_step_and_not_by_name_or_age(tmp_path):
    for step in (1000, 90, 200):
        write(tmp_path / f"checkpoint-{step}")
    assert names(complete(tmp_path)) == ["checkpoint-90", "checkpoint-200", "checkpoint-1000"]
    assert to_resume("auto", tmp_path).name == "checkpoint-1000"


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_or_holds_half_of_one_is_passed_over(tmp_path, name):
    write(tmp_path / "checkpoint-3")
    write(tmp_path / "checkpoint-6", without=name)
    write(tmp_path / "checkpoint-9", cut=name)
    assert to_resume("auto", tmp_path).name == "checkpoint-3"


def test_full_finetuning_leaves_model_weights_instead_of_an_adapter(tmp_path):
    checkpoint = write(tmp_path / "checkpoint-3")
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    seal(checkpoint)
    assert names(complete(tmp_path)) == ["checkpoint-3"]


def test_other_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-", "checkpoint-3b", "checkpoint-3.old", f"{STAGING}/checkpoint-3"):
        write(tmp_path / name)
    assert complete(tmp_path) == []
    assert to_resume("auto", tmp_path) is None
    assert to_resume("auto", tmp_path / "nowhere") is None


def test_never_resumes_nothing_and_a_path_resumes_itself(tmp_path):
    first = write(tmp_path / "checkpoint-3")
    write(tmp_path / "checkpoint-6")
    assert to_resume("never", tmp_path) is None
    assert to_resume(str(first), tmp_path) == first


def test_a_path_that_is_no_complete_checkpoint_is_refused_with_those_that_are(tmp_path):
    good, bad = write(tmp_path / "checkpoint-3"), write(tmp_path / "checkpoint-6", without=STATE)
    with pytest.raises(UserError, match="is not a complete checkpoint") as caught:
        to_resume(str(bad), tmp_path)
    assert str(good) in caught.value.hint


def test_a_published_checkpoint_replaces_its_namesake_and_the_oldest_go(tmp_path):
    for step in (3, 6):
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "checkpoint-9", without=STATE)
    staged = write(tmp_path / STAGING / "checkpoint-9")
    (staged / STATE).write_text('"new"')
    publish(tmp_path, "checkpoint-9", keep=2)
    assert names(complete(tmp_path)) == ["checkpoint-6", "checkpoint-9"]
    assert (tmp_path / "checkpoint-9" / STATE).read_text() == '"new"'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-9"]


def test_a_checkpoint_of_a_run_that_went_back_is_the_newest(tmp_path):
    for step in (3, 30, 60):
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / STAGING / "checkpoint-6")
    publish(tmp_path, "checkpoint-6", keep=2)
    assert names(complete(tmp_path)) == ["checkpoint-3", "checkpoint-6"]


def test_a_checkpoint_that_was_whole_when_its_run_was_killed_gets_its_name_and_half_a_one_goes(tmp_path):
    write(tmp_path / "checkpoint-3")
    write(tmp_path / STAGING / "checkpoint-6")
    write(tmp_path / STAGING / "checkpoint-9", cut="optimizer.pt")
    recover(tmp_path)
    assert names(complete(tmp_path)) == ["checkpoint-3", "checkpoint-6"]
    assert not (tmp_path / STAGING).exists()
