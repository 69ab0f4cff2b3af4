"""Hub data sets and models through the real huggingface_hub and datasets clients, against a hub on 127.0.0.1."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopback_hub import LoopbackHub, files_of
from tiny import save_tiny_model

# The clients read HF_ENDPOINT once, when they are imported, so they get a process of their own.
READER = """
import json, sys
from opensloth import log
log.quiet_libraries()
from opensloth.data.models.resolve import load_tokenizer, resolve_model
from opensloth.data.sources.open import open_source
from opensloth.errors import UserError

def source(**options):
    found = open_source(**options)
    rows = [row.value for row in found.rows()]
    facts = {name: getattr(found, name) for name in ("kind", "name", "split", "subset", "revision", "size", "digest")}
    return facts | {"rows": rows, "columns": found.columns}

def model(**options):
    found = resolve_model(**options)
    ids = load_tokenizer(found)("How many clips").input_ids
    return {"base": found.base, "revision": found.revision, "adapter": found.adapter and str(found.adapter), "ids": ids}

for kind, options in json.load(sys.stdin):
    try:
        result = {"source": source, "model": model}[kind](**options)
    except UserError as error:
        result = {"error": f"{error.message} | {error.hint}"}
    print(json.dumps(result))
"""


def read(env: dict[str, str], *asked: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What open_source and resolve_model answer, in one fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", READER], input=json.dumps(asked), env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def rows(number: int, word: str = "plus") -> list[dict[str, Any]]:
    return [
        {"problem": f"{i} {word} 1?", "generated_solution": "Add.", "expected_answer": str(i)} for i in range(number)
    ]


def card(*configs: tuple[str, tuple[str, ...]]) -> bytes:
    """A README.md whose metadata names the files of each configuration's splits."""
    content = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in splits]}
        for name, splits in configs
    ]
    return f"---\nconfigs: {json.dumps(content)}\n---\n".encode()


SET = "unsloth/OpenMathReasoning-mini"
BASE = "unsloth/Qwen3-4B-Base"
TOKEN = "hf_allowed"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = files_of(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3"))
    adapter = json.dumps({"base_model_name_or_path": BASE, "peft_type": "LORA"}).encode()
    with LoopbackHub() as hub:
        hub.tokens.add(TOKEN)
        cot_and_tir = card(("default", ("cot", "tir")))
        old = {"README.md": cot_and_tir, "default/cot-0.parquet": parquet(rows(3, "minus"))}
        new = {"README.md": cot_and_tir, "default/cot-0.parquet": parquet(rows(5))}
        for files in (old, new):
            hub.publish("datasets", SET, files | {"default/tir-0.parquet": parquet(rows(2))})
        english, chinese = {"en/train-0.parquet": parquet(rows(4))}, {"cn/train-0.parquet": parquet(rows(6))}
        hub.publish(
            "datasets", "a/two-subsets", {"README.md": card(("en", ("train",)), ("cn", ("train",)))} | english | chinese
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows(7)).encode()
        hub.publish("datasets", "a/json-lines", {"train.jsonl": lines})
        hub.publish("datasets", "a/gated", {"train.jsonl": lines}, gated=True)
        hub.publish("datasets", "a/private", {"train.jsonl": lines}, private=True)
        hub.publish("models", BASE, model)
        hub.publish("models", BASE, model | {"README.md": b"a second commit"})
        hub.publish("models", "a/gated", model, gated=True)
        hub.publish("models", "a/private", model, private=True)
        hub.publish("models", "a/adapter", {"adapter_config.json": adapter, "adapter_model.safetensors": b""})
        hub.publish("models", "a/empty", {"README.md": b"nothing here"})
        yield hub


def commits(hub: LoopbackHub, kind: str, repo_id: str) -> list[str]:
    return list(hub.repositories[kind, repo_id].commits)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def anonymous(hub: LoopbackHub, cache: Path) -> dict[str, dict[str, Any]]:
    """Everything a user without a token asks for, by name; one process, because starting one is most of the time."""
    first = commits(hub, "datasets", SET)[0]
    asked = {
        "cot": ("source", {"spec": SET, "split": "cot"}),
        "three": ("source", {"spec": SET, "split": "cot", "samples": 3}),
        "old": ("source", {"spec": SET, "split": "cot", "revision": first}),
        "no split": ("source", {"spec": SET, "split": "coat"}),
        "no revision": ("source", {"spec": SET, "split": "cot", "revision": "v9"}),
        "subset": ("source", {"spec": "a/two-subsets", "subset": "cn"}),
        "no subset": ("source", {"spec": "a/two-subsets", "subset": "fr"}),
        "which subset": ("source", {"spec": "a/two-subsets"}),
        "json lines": ("source", {"spec": "a/json-lines"}),
        "gated": ("source", {"spec": "a/gated"}),
        "private": ("source", {"spec": "a/private"}),
        "missing": ("source", {"spec": "a/missing"}),
        "model": ("model", {"spec": BASE}),
        "old model": ("model", {"spec": BASE, "revision": commits(hub, "models", BASE)[0]}),
        "adapter": ("model", {"spec": "a/adapter"}),
        "gated model": ("model", {"spec": "a/gated"}),
        "private model": ("model", {"spec": "a/private"}),
        "missing model": ("model", {"spec": "a/missing"}),
        "no model revision": ("model", {"spec": BASE, "revision": "v9"}),
        "empty model": ("model", {"spec": "a/empty"}),
    }
    return dict(zip(asked, read(hub.environment(cache), *asked.values()), strict=True))


def test_a_hub_data_set_gives_its_rows_and_the_commit_they_came_from(anonymous: Any, hub: LoopbackHub) -> None:
    found = anonymous["cot"]
    assert found["rows"] == rows(5)
    assert found["columns"] == ["problem", "generated_solution", "expected_answer"]
    assert (found["kind"], found["split"], found["name"]) == ("hub", "cot", "OpenMathReasoning-mini")
    assert found["revision"] == commits(hub, "datasets", SET)[-1]
    assert anonymous["json lines"]["rows"] == rows(7)


def test_samples_limits_the_rows_of_a_hub_data_set(anonymous: Any) -> None:
    assert anonymous["three"]["rows"] == rows(3)


def test_a_pinned_revision_gives_that_commits_rows(anonymous: Any, hub: LoopbackHub) -> None:
    assert anonymous["old"]["rows"] == rows(3, "minus")
    assert anonymous["old"]["revision"] == commits(hub, "datasets", SET)[0]
    assert anonymous["old"]["digest"] != anonymous["cot"]["digest"]


def test_a_subset_is_read_and_a_wrong_one_lists_what_there_is(anonymous: Any) -> None:
    assert anonymous["subset"]["rows"] == rows(6)
    for asked in ("no subset", "which subset"):
        assert "en" in anonymous[asked]["error"]
        assert "cn" in anonymous[asked]["error"]
        assert "--subset" in anonymous[asked]["error"]


def test_a_wrong_split_names_the_nearest_one(anonymous: Any) -> None:
    assert "it has: cot, tir" in anonymous["no split"]["error"]
    assert "Did you mean cot?" in anonymous["no split"]["error"]


def test_a_wrong_revision_is_named(anonymous: Any) -> None:
    assert "v9" in anonymous["no revision"]["error"]
    assert "v9" in anonymous["no model revision"]["error"]


def test_refusals_say_what_to_do(anonymous: Any) -> None:
    for asked in ("gated", "private", "missing", "gated model", "private model", "missing model"):
        error = anonymous[asked]["error"]
        assert "HF_TOKEN" in error, asked
        assert error.split()[0] != "error:"
        assert "\n" not in error, asked
    for asked in ("gated", "gated model"):
        assert "gated" in anonymous[asked]["error"]
        assert "terms" in anonymous[asked]["error"]
    for asked in ("missing", "missing model"):
        assert "a/missing" in anonymous[asked]["error"]


def test_a_hub_model_gives_its_tokenizer_and_the_commit(anonymous: Any, hub: LoopbackHub) -> None:
    old, new = commits(hub, "models", BASE)
    assert anonymous["model"]["base"] == anonymous["old model"]["base"] == BASE
    assert anonymous["model"]["revision"] == new
    assert anonymous["old model"]["revision"] == old
    assert anonymous["model"]["ids"]


def test_a_hub_adapter_brings_its_base(anonymous: Any, hub: LoopbackHub) -> None:
    found = anonymous["adapter"]
    assert found["base"] == BASE
    assert found["revision"] == commits(hub, "models", BASE)[-1]
    assert (Path(found["adapter"]) / "adapter_config.json").is_file()
    assert found["ids"] == anonymous["model"]["ids"]


def test_a_repository_without_a_model_is_named(anonymous: Any) -> None:
    assert "config.json" in anonymous["empty model"]["error"]


def test_a_token_opens_gated_and_private_repositories_and_a_wrong_one_does_not(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    asked = [(kind, {"spec": spec}) for kind in ("source", "model") for spec in ("a/gated", "a/private")]
    for found in read(hub.environment(tmp_path / "allowed", TOKEN), *asked):
        assert "error" not in found
    refused = read(hub.environment(tmp_path / "refused", "hf_other"), *asked)
    assert all("error" in found for found in refused)
    assert "gated" in refused[0]["error"]  # 403: logged in, but the terms are not accepted
    assert "gated" in refused[2]["error"]


def test_without_a_network_the_cache_answers_or_the_error_says_so(tmp_path: Path) -> None:
    known = [("source", {"spec": SET, "split": "cot"}), ("model", {"spec": BASE})]
    unknown = [("source", {"spec": "a/other"}), ("model", {"spec": "a/other"})]
    with LoopbackHub() as hub:
        hub.publish(
            "datasets", SET, {"README.md": card(("default", ("cot",))), "default/cot-0.parquet": parquet(rows(5))}
        )
        hub.publish("models", BASE, files_of(save_tiny_model(tmp_path / "model", "qwen3")))
        env = hub.environment(tmp_path / "cache")
        online = read(env, *known)
    for offline in (env, env | {"HF_HUB_OFFLINE": "1"}):  # the server is gone; and the clients are told not to ask it
        *found, no_set, no_model = read(offline, *known, *unknown)
        assert found == online
        for refusal in (no_set, no_model):
            assert "a/other" in refusal["error"]
            assert "cannot be reached" in refusal["error"] or "HF_HUB_OFFLINE is set" in refusal["error"]
