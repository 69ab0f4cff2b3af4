"""Settings: how defaults, a config file and flags become one checked job."""

from pathlib import Path

import pytest

from opensloth.config.base import Settings, declared, resolve
from opensloth.config.jobs import DataJob, GrpoJob, PromptOptions, SftJob, TrainGrpoJob, TrainSftJob, part
from opensloth.errors import UserError

JOBS = (DataJob, SftJob, TrainSftJob, GrpoJob, TrainGrpoJob)
DATA = {"input": "rows.jsonl", "model": "m"}
SFT = {"data": "prepared"}


def refused(settings: type[Settings], flags: dict[str, object], config: Path | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(settings, flags, config)
    return caught.value


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(config):
    resolved = resolve(SftJob, {**SFT, "lr": "3e-5"}, config("lr: 1e-3\nepochs: 2\n"))
    assert (resolved.job.lr, resolved.job.epochs, resolved.job.lora_r) == (3e-5, 2.0, 16)


def test_every_setting_knows_where_its_value_came_from(config):
    path = config("epochs: 2\nlr: 1e-3\n")
    origins = resolve(SftJob, {**SFT, "lr": "3e-5"}, path).origins
    assert origins["lr"] == "flag"
    assert origins["epochs"] == f"config {path}"
    assert origins["lora_r"] == "default"
    assert set(origins) == set(SftJob.model_fields)


def test_a_value_that_was_not_given_is_no_value():
    assert resolve(SftJob, {**SFT, "lr": None}).origins["lr"] == "default"


def test_an_unknown_name_in_a_file_is_an_error_with_the_nearest_one(config):
    error = refused(SftJob, SFT, config("lora_rank: 8\n"))
    assert "unknown setting 'lora_rank'" in error.message
    assert error.hint == "Did you mean lora_r?"


def test_names_in_a_file_take_dashes_and_underscores(config):
    job = resolve(DataJob, DATA, config("max-seq-length: 64\ntarget_only: false\n")).job
    assert (job.max_seq_length, job.target_only) == (64, False)


@pytest.mark.parametrize("text", ["- a\n- b\n", "lr: [\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(config, text):
    error = refused(SftJob, SFT, config(text))
    assert "job.yaml" in error.message
    assert "\n" not in error.message


def test_a_missing_config_file_is_named(tmp_path):
    assert "none.yaml" in refused(SftJob, SFT, tmp_path / "none.yaml").message


def test_an_empty_config_file_changes_nothing(config):
    assert resolve(SftJob, SFT, config("")).job == resolve(SftJob, SFT).job


def test_a_wrong_value_in_a_file_names_the_file_and_the_setting(config):
    message = refused(SftJob, SFT, config("epochs: soon\n")).message
    assert "job.yaml: epochs soon" in message


def test_a_wrong_value_of_a_flag_names_the_flag():
    assert refused(DataJob, {**DATA, "eval_fraction": "1.5"}).message.startswith("--eval-fraction 1.5: ")


@pytest.mark.parametrize(
    ("settings", "flags", "named"),
    [
        (DataJob, {"input": "x"}, "--model"),
        (DataJob, {"model": "m"}, "INPUT"),
        (SftJob, {}, "DIR"),
    ],
)
def test_a_missing_setting_is_named_as_it_is_typed(settings, flags, named):
    error = refused(settings, flags)
    assert error.message == f"{named} is missing."
    assert error.hint.startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ("--load-in-4bit", "--load-in-8bit")),
        ({"full_finetuning": True, "load_in_4bit": True}, ("--full-finetuning", "--load-in-4bit")),
        ({"grad_accum": "2"}, ("--grad-accum", "--batch-size")),
        ({"batch_size": "2", "pack_tokens": "512"}, ("--batch-size", "--pack-tokens")),
        ({"batch_size": "2", "tokens_per_step": "100"}, ("--batch-size", "--tokens-per-step")),
        ({"nnodes": "2"}, ("--nnodes", "--rdzv-endpoint")),
        ({"node_rank": "1"}, ("--node-rank", "--nnodes")),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(flags, both):
    message = refused(SftJob, {**SFT, **flags}).message
    assert all(name in message for name in both)


@pytest.mark.parametrize("typed", ["inf", "nan", "-1"])
def test_endless_epochs_are_refused(typed):
    assert refused(SftJob, {**SFT, "epochs": typed}).message.startswith("--epochs")


def test_batch_size_and_accumulation_go_together():
    job = resolve(SftJob, {**SFT, "batch_size": "2", "grad_accum": "4"}).job
    assert (job.batch_size, job.grad_accum) == (2, 4)


@pytest.mark.parametrize(("typed", "value"), [("5%", 0.05), ("0.1", 0.1), ("20", 20.0), ("0", 0.0)])
def test_the_warm_up_is_steps_a_share_or_a_percentage(typed, value):
    assert resolve(SftJob, {**SFT, "warmup_steps": typed}).job.warmup_steps == pytest.approx(value)


@pytest.mark.parametrize(("typed", "value"), [("auto", "auto"), ("4096", 4096)])
def test_tokens_per_step_is_auto_or_a_number(typed, value):
    assert resolve(SftJob, {**SFT, "tokens_per_step": typed}).job.tokens_per_step == value


@pytest.mark.parametrize("typed", ["some", "0", "-5"])
def test_other_sizes_of_a_step_are_refused(typed):
    assert refused(SftJob, {**SFT, "tokens_per_step": typed}).message.startswith("--tokens-per-step")


@pytest.mark.parametrize("typed", ["adamw-8bit", "adamw_8bit"])
def test_choices_take_dashes_and_underscores(typed):
    assert resolve(SftJob, {**SFT, "optim": typed}).job.optim == "adamw_8bit"


def test_a_word_that_is_no_choice_is_refused_with_the_choices():
    message = refused(DataJob, {**DATA, "overlong": "cut"}).message
    assert message == "--overlong cut: must be one of drop, truncate, error."


def test_yaml_s_bare_on_and_off_are_words_where_words_are_meant(config):
    assert resolve(SftJob, SFT, config("compile: off\n")).job.compile == "off"


def test_lists_are_comma_separated_words_or_yaml_lists(config):
    flags = resolve(SftJob, {**SFT, "lora_targets": ["q_proj,v_proj", "o_proj"]}).job
    file = resolve(SftJob, SFT, config("lora_targets: [q_proj, v_proj, o_proj]\n")).job
    assert flags.lora_targets == file.lora_targets == ("q_proj", "v_proj", "o_proj")


def test_gpus_may_be_a_yaml_list_or_number(config):
    assert resolve(SftJob, SFT, config("gpus: [0, 2]\n")).job.gpus == "0,2"
    assert resolve(SftJob, SFT, config("gpus: 4\n")).job.gpus == "4"


def test_a_file_may_hold_the_settings_of_the_other_command(config):
    path = config("max_seq_length: 64\nlr: 1e-3\n")
    assert resolve(SftJob, SFT, path, beside=DataJob.model_fields).job.lr == 1e-3
    assert resolve(DataJob, DATA, path, beside=SftJob.model_fields).job.max_seq_length == 64
    assert "unknown setting 'lr'" in refused(DataJob, DATA, path).message


def test_a_job_never_changes_once_it_is_resolved():
    job = resolve(SftJob, SFT).job
    with pytest.raises(ValueError, match="frozen"):
        job.lr = 1.0


@pytest.mark.parametrize("settings", JOBS)
def test_every_setting_has_one_sentence_of_help_and_fitting_choices(settings):
    for item in declared(settings):
        assert item.help.endswith("."), item.name
        default = item.info.default
        assert not item.choices or default in item.choices, item.name


@pytest.mark.parametrize(
    ("one", "training", "of_no_use"),
    [(TrainSftJob, SftJob, set(PromptOptions.model_fields)), (TrainGrpoJob, GrpoJob, set())],
)
def test_the_parts_of_the_one_command_job_are_the_two_jobs(one, training, of_no_use):
    job = resolve(one, {**DATA, "lr": "1e-3", "samples": "5"}).job
    assert part(job, DataJob)["samples"] == 5
    assert part(job, training)["lr"] == 1e-3
    missing = (set(DataJob.model_fields) | set(training.model_fields)) - set(one.model_fields)
    assert missing == {"method", "data"} | of_no_use


def test_the_record_of_a_job_can_be_read_back_as_a_config_file(config):
    import yaml

    first = resolve(SftJob, {**SFT, "lora_targets": "q_proj,v_proj", "warmup_steps": "5%"})
    values = {name: item["value"] for name, item in first.record().items()}
    assert resolve(SftJob, {}, config(yaml.safe_dump(values))).job == first.job


@pytest.mark.parametrize(("updates", "expected"), [("1", 25), ("2", 26), ("4", 28), ("5", 25), ("50", 50)])
def test_checkpoints_lie_between_batches_unless_somebody_wants_otherwise(updates, expected):
    resolved = resolve(GrpoJob, {**SFT, "updates_per_batch": updates})
    assert (resolved.job.save_steps, resolved.origins["save_steps"]) == (expected, "default")
    again = {name: entry["value"] for name, entry in resolved.record().items()}
    assert GrpoJob.model_validate(again) == resolved.job  # as a worker reads it
    if expected != 25:
        error = refused(GrpoJob, {**SFT, "updates_per_batch": updates, "save_steps": 25})
        assert f"--save-steps {expected} is the next that is" in error.message


@pytest.mark.parametrize("updates", ["0", "-1", "x"])
def test_updates_that_are_no_count_are_refused(updates):
    assert "--updates-per-batch" in refused(GrpoJob, {**SFT, "updates_per_batch": updates}).message
