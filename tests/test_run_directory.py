"""A run directory belongs to one job: it is begun, gone on with or finished, and never mixed up with another's."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from opensloth import paths
from opensloth.cli import program, train
from opensloth.config.jobs import SftJob
from opensloth.data.models.resolve import resolve_model
from opensloth.data.prepared.directory import open_prepared
from opensloth.errors import UserError
from opensloth.launch import run_directory
from opensloth.launch.world import World
from opensloth.training import checkpoint
from opensloth.training.callbacks import Metrics
from opensloth.training.run import check_same_checkpoint
from tiny import save_tiny_model
from training_fixtures import call, in_this_process, sft, write_rows  # noqa: F401

ADAPTER = "adapter_model.safetensors"
JOB = ("rows.jsonl", "--model", "model", "--processes", "1", "--tokens-per-step", "200", "--max-steps", "6")
SAVES = ("--save-steps", "2", "--save-total-limit", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, rows, and the finished run `whole` with checkpoints of steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("runs")
    save_tiny_model(directory / "model")
    write_rows(directory / "rows.jsonl", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(run_directory, "run_workers", in_this_process)
        assert program.run(train.app, ["sft", *JOB, *SAVES, "--output", "whole"]) == 0
    return directory


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def finished(here, tmp_path):
    return Path(shutil.copytree(here / "whole", tmp_path / "run"))


@pytest.fixture
def unfinished(finished):
    """As a run that was killed after step 6, before it saved its adapter."""
    (finished / "result.json").unlink()
    (finished / ADAPTER).unlink()
    return finished


@pytest.fixture
def call_job(call, here):  # noqa: F811
    return lambda output, *more: call(*JOB, *SAVES, "--output", output, *more)


def same_adapter(run, here):
    return (run / ADAPTER).read_bytes() == (here / "whole" / ADAPTER).read_bytes()


def test_a_finished_run_says_so_and_is_left_alone(finished, call_job):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, out = call_job(finished, "--json")
    assert code == 0, out
    answer = next(json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert answer["status"] == "already finished"
    assert answer["metrics"] == json.loads((finished / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--lr", "1e-3"), "lr (0.0002 there, 0.001 now)"),
        (("--lora-r", "4", "--epochs", "3"), "epochs (1.0 there, 3.0 now), lora_r (16 there, 4 now)"),
        (("--samples", "20"), "data ("),
        (("--model", "other"), "model ("),
    ],
)
def test_another_job_in_the_directory_is_refused_and_the_settings_are_named(here, finished, call_job, change, named):
    if not (here / "other").exists():
        shutil.copytree(here / "model", here / "other")
    code, out = call_job(finished, *change)
    assert code == 2, out
    assert f"{finished} holds another job: " in out
    assert named in out
    assert "--force" in out


def test_a_mistake_that_only_the_model_tells_leaves_the_place_to_the_job_without_it(tmp_path, call_job):
    output = tmp_path / "mistaken"
    code, out = call_job(output, "--lora-targets", "q_porj")
    assert (code, "The model has no layer q_porj" in out) == (2, True), out
    (output / "checkpoints").mkdir()  # as a trainer leaves it that fails in its first step
    code, out = call_job(output, "--max-steps", "1")
    assert code == 0, out
    code, out = call_job(output, "--max-steps", "2")  # this one has trained
    assert (code, "holds another job: max_steps (1 there, 2 now)" in out) == (2, True), out


@pytest.mark.parametrize("trained", ["best/best.json", "checkpoints/.incomplete/checkpoint-7/state.json"])
def test_what_another_job_trained_is_kept_though_it_saved_no_checkpoint(tmp_path, call_job, trained):
    output = tmp_path / "begun"
    assert call_job(output, "--lora-targets", "q_porj")[0] == 2
    (output / trained).parent.mkdir(parents=True)
    (output / trained).write_text('{"step": 7}')
    code, out = call_job(output, "--max-steps", "1")
    assert (code, "holds another job" in out) == (2, True), out
    assert (output / trained).exists()


@pytest.mark.parametrize(
    "change", [("--pack-tokens", "512"), ("--logging-steps", "3"), ("--save-steps", "5"), ("--timeout", "60")]
)
def test_settings_that_change_no_weight_may_differ(finished, call_job, change):
    code, out = call_job(finished, *change)
    assert (code, "already finished" in out) == (0, True), out


def test_with_batch_size_the_processes_decide_what_a_step_holds_and_so_which_job_it_is(here, finished):
    prepared = open_prepared(Path(json.loads((finished / "job.json").read_text())["data"]["directory"]))
    ref = resolve_model("model")

    def job(processes, **options):
        return run_directory.identity(SftJob(data=prepared.directory, **options), prepared, ref, processes)

    assert job(1) == job(2)
    assert job(1, batch_size=4) != job(2, batch_size=4)
    assert job(1, batch_size=4, grad_accum=2) == job(2, batch_size=4) == job(4, batch_size=2)


def test_the_same_data_in_another_directory_is_the_same_job(here, finished, call, tmp_path):  # noqa: F811
    data = json.loads((finished / "job.json").read_text())["data"]["directory"]
    moved = shutil.copytree(data, tmp_path / "moved")
    code, out = call(moved, *JOB[3:], *SAVES, "--output", finished, app=sft.app)
    assert (code, "already finished" in out) == (0, True), out


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_half_written_newest_checkpoint_is_passed_over(unfinished, here, call_job, damage):
    file = unfinished / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        file.unlink()
    code, out = call_job(unfinished)
    assert code == 0, out
    assert f"going on from {unfinished / 'checkpoints' / 'checkpoint-4'}" in out
    assert same_adapter(unfinished, here)
    assert len(checkpoint.complete(unfinished / "checkpoints")) == 3


def test_a_checkpoint_that_was_being_written_is_no_checkpoint(unfinished, here, call_job):
    """The run was killed while it wrote checkpoint 6 under its other name."""
    staging = unfinished / "checkpoints" / checkpoint.STAGING
    staging.mkdir()
    (unfinished / "checkpoints" / "checkpoint-6").rename(staging / "checkpoint-6")
    (staging / "checkpoint-6" / "trainer_state.json").unlink()
    code, out = call_job(unfinished)
    assert code == 0, out
    assert "checkpoint-4" in out
    assert same_adapter(unfinished, here)
    assert not staging.exists()


def test_a_run_that_was_killed_after_its_last_checkpoint_only_saves(unfinished, here, call_job):
    code, out = call_job(unfinished)
    assert code == 0, out
    assert same_adapter(unfinished, here)
    kept = json.loads((here / "whole" / "result.json").read_text())
    found = json.loads((unfinished / "result.json").read_text())
    for result in (found, kept):
        # of this life of the run, in which nothing was left to train, and of the process of all tests here
        del result["seconds"], result["per_process"], result["memory_gib"]
    assert found == kept


def test_full_finetuning_is_resumed_exactly_too(here, call, tmp_path):  # noqa: F811
    job = (*JOB, *SAVES, "--full-finetuning", "--output", tmp_path / "run")
    assert call(*job)[0] == 0
    weights = tmp_path / "run" / "model.safetensors"
    whole = weights.read_bytes()
    for path in (weights, tmp_path / "run" / "result.json"):
        path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    code, out = call(*job)
    assert (code, "checkpoint-4" in out) == (0, True), out
    assert weights.read_bytes() == whole


def test_a_checkpoint_that_the_disk_refuses_ends_the_run_and_costs_those_before_it_nothing(
    here, call_job, tmp_path, monkeypatch
):
    seal = checkpoint.seal

    def refuse(directory):
        if directory.name == "checkpoint-4":
            raise OSError(errno.EROFS, "Read-only file system", str(directory))
        seal(directory)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", refuse)
        code, out = call_job(tmp_path / "run")
    assert code == 3, out
    assert "checkpoint-4 could not be saved. Cannot write" in out
    assert "Read-only file system" in out
    assert "Traceback" not in out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    code, out = call_job(tmp_path / "run")
    assert (code, "checkpoint-2" in out) == (0, True), out
    assert same_adapter(tmp_path / "run", here)


@pytest.fixture
def own_data(here, tmp_path):
    """A copy of the data of the runs, which a test may spoil."""
    used = json.loads((here / "whole" / "job.json").read_text())["data"]["directory"]
    return Path(shutil.copytree(used, tmp_path / "data"))


@pytest.mark.parametrize("lost", ["plan.parquet", "rows", "."])
def test_data_that_is_gone_when_a_run_goes_on_is_named_and_the_run_kept(unfinished, own_data, call, lost):  # noqa: F811
    gone = own_data / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    code, out = call(own_data, *JOB[1:], *SAVES, "--output", unfinished, app=sft.app)
    assert code == 2, out
    assert str(gone) in out
    assert "Traceback" not in out
    assert len(checkpoint.complete(unfinished / "checkpoints")) == 3


def test_data_that_is_removed_while_a_run_reads_it_does_not_disturb_it(own_data, here, call, tmp_path, monkeypatch):  # noqa: F811
    on_log = Metrics.on_log

    def remove(self, *arguments, **more):
        shutil.rmtree(own_data, ignore_errors=True)
        on_log(self, *arguments, **more)

    monkeypatch.setattr(Metrics, "on_log", remove)
    code, out = call(own_data, *JOB[1:], *SAVES, "--output", tmp_path / "run", app=sft.app)
    assert code == 0, out
    assert not own_data.exists()
    assert same_adapter(tmp_path / "run", here)


def test_resume_takes_the_path_of_a_checkpoint(unfinished, here, call_job):
    older = unfinished / "checkpoints" / "checkpoint-2"
    code, out = call_job(unfinished, "--resume", older)
    assert code == 0, out
    assert f"going on from {older}" in out
    assert same_adapter(unfinished, here)


def test_resume_never_refuses_checkpoints_and_force_removes_them(unfinished, here, call_job):
    code, out = call_job(unfinished, "--resume", "never")
    assert code == 2, out
    assert "holds checkpoints" in out
    assert (unfinished / "checkpoints" / "checkpoint-2").is_dir()
    code, out = call_job(unfinished, "--resume", "never", "--force")
    assert code == 0, out
    assert "going on" not in out
    assert same_adapter(unfinished, here)


def test_force_replaces_another_job_and_deletes_nothing_that_is_no_run(finished, tmp_path, call_job):
    code, out = call_job(finished, "--lora-r", "4", "--max-steps", "1", "--force")
    assert code == 0, out
    assert [path.name for path in checkpoint.complete(finished / "checkpoints")] == ["checkpoint-1"]
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 2
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")
    code, out = call_job(thesis, "--force")
    assert code == 2, out
    assert "holds something that is no run" in out
    assert (thesis / "chapter.tex").exists()


@pytest.mark.parametrize("output", ["rows.jsonl", "rows.jsonl/run", "/proc/run"])
def test_an_output_that_cannot_be_written_is_known_before_the_data_is_prepared(call_job, monkeypatch, output):
    from opensloth.data.prepared import prepare

    monkeypatch.setattr(prepare, "prepare", None)
    code, out = call_job(output)
    assert code == 2, out
    assert "Traceback" not in out


def test_two_jobs_have_two_default_directories(place, here, call):  # noqa: F811
    for more in ((), ("--lr", "1e-3"), ()):
        code, out = call(*JOB[:-1], "1", *more)
        assert code == 0, out
    made = sorted(path.name for path in (here / "outputs").iterdir())
    assert len(made) == 2
    assert all(name.startswith("sft-model-rows-") for name in made)
    assert "already finished" in out


def test_metrics_of_a_killed_run_are_read_up_to_the_step_that_is_gone_on_from(tmp_path):
    written = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*written, '{"step": 4, "lo']))
    metrics = Metrics.__new__(Metrics)
    metrics.path = tmp_path / "metrics.jsonl"
    metrics.keep_before(3)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2]
    metrics.keep_before(0)
    assert metrics.path.read_text() == ""


def test_processes_that_find_different_checkpoints_do_not_start(tmp_path):
    check_same_checkpoint(["checkpoint-4", "checkpoint-4"], tmp_path)
    with pytest.raises(UserError, match="process 2 from none") as caught:
        check_same_checkpoint(["checkpoint-4", "checkpoint-4", "none"], tmp_path)
    assert "same directory" in caught.value.hint


def test_two_commands_do_not_train_in_one_directory(tmp_path):
    with (
        paths.one_at_a_time(tmp_path / "run"),
        pytest.raises(UserError, match="Another command is training"),
        run_directory.one_command(tmp_path / "run", World(("cpu",))),
    ):
        pass
    with run_directory.one_command(tmp_path / "run", World(("cpu",))):
        pass  # free again


@pytest.mark.parametrize(("fraction", "warned"), [("0", True), ("0.2", False)])
def test_evaluation_of_nothing_is_told(fraction, warned, tmp_path, monkeypatch, capfd):
    def no_run(*_, **__):
        raise UserError("This is as far as it goes.")

    monkeypatch.setattr(run_directory, "run_workers", no_run)
    monkeypatch.chdir(tmp_path)
    job = ["sft", "sample:arithmetic", "--model", "sample:tiny", "--samples", "20", "--eval-steps", "5"]
    assert program.run(train.app, [*job, "--processes", "1", "--eval-fraction", fraction]) == 2
    assert ("--eval-steps evaluates nothing" in capfd.readouterr().err) == warned
