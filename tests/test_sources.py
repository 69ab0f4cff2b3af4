import errno
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopback_hub import LoopbackHub
from opensloth.data.sources import files
from opensloth.data.sources.open import RawRow, Source, open_source
from opensloth.errors import UserError

ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(7)]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


FORMATS = {
    ".jsonl": as_jsonl(ROWS),
    ".json": json.dumps(ROWS).encode(),
    ".csv": as_csv(ROWS),
    ".parquet": as_parquet(ROWS),
}


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def values(source: Source) -> list[Any]:
    return [row.value for row in source.rows()]


def problems(source: Source) -> list[tuple[int, str | None]]:
    return [(row.line, row.problem) for row in source.rows() if row.problem]


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(open_source(*args, **options).rows())
    return str(caught.value)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("extension", list(FORMATS))
def test_every_file_format_gives_the_same_rows(tmp_path: Path, extension: str, compression: str) -> None:
    content = FORMATS[extension]
    if compression == ".gz":
        content = gzip.compress(content[:40]) + gzip.compress(content[40:])  # as two gzip files, concatenated
    elif compression == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    source = open_source(write(tmp_path / f"My data.v1{extension}{compression}", content))
    assert values(source) == ROWS
    assert values(source) == ROWS, "rows() may be called again"
    assert (source.kind, source.name, source.columns) == ("file", "My-data", ["question", "answer"])


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS, indent=2).encode(),
        b"\xef\xbb\xbf \r\n" + json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(),
        as_jsonl(ROWS),
        "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    ],
    ids=["indented list", "BOM and CRLF", "lines", "indented objects"],
)
def test_a_json_file_may_hold_a_list_or_objects(tmp_path: Path, content: bytes) -> None:
    assert values(open_source(write(tmp_path / "a.json", content))) == ROWS


def test_a_json_list_is_parsed_across_the_bounds_of_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 5)
    assert values(open_source(write(tmp_path / "a.json", json.dumps(ROWS).encode()))) == ROWS


@pytest.mark.parametrize(
    "content", [b'[{"a": 1}, {"a": ', b'[{"a": 1}, {"a" 1}]', b'[{"a": 1}', b'[{"a": 1}] {"a": 2}', b'[{"a": "\xff"}]']
)
def test_a_damaged_json_list_is_refused_whole(tmp_path: Path, content: bytes) -> None:
    assert "a.json" in refused(write(tmp_path / "a.json", content))


def test_bad_lines_are_rows_with_a_problem_and_their_line_number(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first"}\r\n',
        b"\r\n",
        b'{"text": "broken\r\n',
        b"   \t \n",
        b'["a", "list"]\n',
        b"7\n",
        b'{"text": "\xff\xfe"}\n',
        b'{"text": "\\ud800"}\n',
        b'{"text": "\\ud83d\\ude00"}\n',
        b"[" * 100_000 + b"\n",
        b'{"n": ' + b"9" * 5000 + b"}\n",
        b"null\n",
        '{"text": "one\u2028line"}'.encode(),
    ]
    source = open_source(write(tmp_path / "a.jsonl", b"".join(lines)))
    assert problems(source) == [
        (3, "broken JSON"),
        (5, "not an object"),
        (6, "not an object"),
        (7, "not UTF-8"),
        (8, "not Unicode text"),
        (10, "broken JSON"),
        (11, "broken JSON"),
        (12, "not an object"),
    ]
    assert [value["text"] for value in values(source) if value] == ["first", "\U0001f600", "one\u2028line"]
    assert len(list(source.rows())) == 11, "blank lines are not rows"


def test_a_line_without_end_costs_one_row_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROW_BYTES", 64)
    content = b'{"text": "a"}\n{"text": "' + b"x" * 500 + b'"}\n{"text": "b"}\n'
    source = open_source(write(tmp_path / "a.jsonl", content))
    assert problems(source) == [(2, "row over 64 MiB")]
    assert [value["text"] for value in values(source) if value] == ["a", "b"]


def test_csv_rows_carry_the_line_they_start_on(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfq,a\r\n"two\r\nlines",1\r\n\r\nb,2,3\r\nc\r\n\xff,4\r\n"say ""hi""",5\r\n'
    source = open_source(write(tmp_path / "a.csv", content))
    assert problems(source) == [
        (5, "more fields than the header"),
        (6, "fewer fields than the header"),
        (7, "not UTF-8"),
    ]
    rows = [row for row in source.rows() if row.value]
    assert rows == [RawRow(2, {"q": "two\r\nlines", "a": "1"}), RawRow(8, {"q": 'say "hi"', "a": "5"})]


def test_a_csv_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    assert "twice" in refused(write(tmp_path / "a.csv", b"q,q\n1,2\n"))


def test_text_in_parquet_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert problems(source) == [(2, "not UTF-8")]
    assert [value["text"] for value in values(source) if value] == ["good", "fine"]
    assert source.size == 3


def test_samples_bound_the_rows_and_not_the_lines(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", b'\n\n{"text": "1"}\nbroken\n\n{"text": "2"}\n{"text": "3"}\n')
    source = open_source(spec, samples=3)
    assert [row.line for row in source.rows()] == [3, 4, 6]
    assert source.digest == open_source(spec).digest
    assert open_source(write(tmp_path / "a.parquet", FORMATS[".parquet"]), samples=3).size == 3


def test_the_digest_follows_the_content_alone(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a.jsonl", FORMATS[".jsonl"]), write(tmp_path / "b.jsonl", FORMATS[".jsonl"])
    other = write(tmp_path / "c.jsonl", FORMATS[".jsonl"] + b"\n")
    assert open_source(one).digest == open_source(same).digest != open_source(other).digest


def test_columns_are_those_of_most_rows(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}] * 5 + [{"messages": []}] + [{"question": "q", "answer": "a", "x": 1}]
    assert open_source(write(tmp_path / "a.jsonl", as_jsonl(rows))).columns == ["question", "answer"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("extension", [".jsonl", ".json", ".csv"])
def test_an_empty_file_is_refused(tmp_path: Path, extension: str, content: bytes) -> None:
    assert "holds no rows" in refused(write(tmp_path / f"a{extension}", content))


def test_a_file_without_one_readable_row_is_refused(tmp_path: Path) -> None:
    assert "row 1: broken JSON" in refused(write(tmp_path / "a.jsonl", b"<html>\n" * 300))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.parquet.gz"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    content = FORMATS[".parquet"] if "parquet" in name else FORMATS[".jsonl"] * 50
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    message = refused(write(tmp_path / name, content[:-20]))
    assert name in message


def test_a_missing_file_is_named_with_its_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train_data.jsonl", FORMATS[".jsonl"])
    assert "Did you mean" in refused(str(tmp_path / "traindata.jsonl"))
    assert "train_data.jsonl" in refused(str(tmp_path / "zzz.csv"))
    assert str(tmp_path) in refused(str(tmp_path / "no" / "such" / "file.jsonl"))
    assert ".parquet" in refused(write(tmp_path / "notes.txt", b"hello"))


@pytest.mark.parametrize("spec", ["./mine", "../a/b", "~/mine", "a/b/c", "mine.jsonl", "owner/data.csv", "data.txt"])
def test_what_is_written_as_a_path_is_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refused(spec)


def test_options_that_mean_nothing_for_a_source_are_refused(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", FORMATS[".jsonl"])
    assert "--subset" in refused(spec, subset="en")
    assert "--data-revision" in refused("sample:arithmetic", revision="main")
    assert "no split 'test'" in refused(spec, split="test")
    assert "Did you mean test?" in refused("sample:arithmetic", split="tset")
    assert "sample:arithmetic" in refused("sample:arithmetik")
    assert values(open_source(write(tmp_path / "my-test.jsonl", FORMATS[".jsonl"]), split="test")) == ROWS


def test_a_directory_is_read_by_splits(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", as_jsonl(ROWS[:2]))
    write(tmp_path / "data" / "train-00001-of-00002.jsonl.gz", gzip.compress(as_jsonl(ROWS[2:4])))
    write(tmp_path / "data" / "dev.jsonl", as_jsonl(ROWS[4:]))
    write(tmp_path / "dataset_infos.json", b"{}")
    write(tmp_path / ".cache" / "x.jsonl", b"{}")
    source = open_source(str(tmp_path))
    assert (values(source), source.kind) == (ROWS[:4], "directory")
    assert [row.line for row in source.rows()] == [1, 2, 3, 4]
    assert values(open_source(str(tmp_path), split="validation")) == ROWS[4:]
    assert "it has: train, validation" in refused(str(tmp_path), split="test")
    assert source.digest != open_source(str(tmp_path), split="dev").digest
    write(tmp_path / "more.csv", FORMATS[".csv"])
    assert ".csv, .jsonl" in refused(str(tmp_path))


def test_directories_that_are_no_data_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", b"hello")
    assert "no data files" in refused(str(tmp_path))
    write(tmp_path / "manifest.json", b"{}")
    write(tmp_path / "prompt.json", b"{}")
    assert "os-sft" in refused(str(tmp_path))


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bar()
    whole = datasets.Dataset.from_list(ROWS)
    whole.filter(lambda row: "3" not in row["question"]).save_to_disk(str(tmp_path / "one"), num_shards=2)
    one = open_source(str(tmp_path / "one"))
    assert values(one) == [row for row in ROWS if "3" not in row["question"]]
    datasets.DatasetDict({"train": whole, "test": whole.select([5, 1])}).save_to_disk(str(tmp_path / "many"))
    assert values(open_source(str(tmp_path / "many"), split="test")) == [ROWS[5], ROWS[1]]
    assert "Did you mean train?" in refused(str(tmp_path / "many"), split="trian")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "lacks its file" in refused(str(tmp_path / "one"))


# The clients read HF_ENDPOINT once, when they are imported, so the hub is asked in a process of its own.
ASK = """
import json, sys
from opensloth import log
log.quiet_libraries()
from opensloth.data.sources.open import open_source
from opensloth.errors import UserError
answers = {}
for name, (spec, options) in json.load(sys.stdin).items():
    try:
        answers[name] = [[row.line, row.value, row.problem] for row in open_source(spec, **options).rows()]
    except UserError as error:
        answers[name] = f"{error.message} {error.hint}"
json.dump(answers, sys.stdout)
"""
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "two files": ("acme/parts", {}),
    "three rows": ("acme/parts", {"samples": 3}),
    "broken line": ("acme/lines", {}),
    "csv": ("acme/table", {"split": "test"}),
    "slice": ("acme/lines", {"split": "train[:10]"}),
    "bare name": ("maths", {}),
    "bad name": ("acme/-math--", {}),
    "no data": ("acme/empty", {}),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    with LoopbackHub() as hub:
        parts = {"data/train-0.parquet": as_parquet(ROWS[:3]), "data/train-1.parquet": as_parquet(ROWS[3:])}
        hub.publish("datasets", "acme/parts", parts)
        hub.publish("datasets", "acme/lines", {"train.jsonl": as_jsonl(ROWS[:1]) + b"broken\n" + as_jsonl(ROWS[1:])})
        hub.publish("datasets", "acme/table", {"train.csv": FORMATS[".csv"], "test.csv": as_csv(ROWS[:2])})
        hub.publish("datasets", "acme/empty", {"README.md": b"nothing yet"})
        environment = hub.environment(home) | {"OPENSLOTH_CACHE": str(home / "opensloth")}
        command = [sys.executable, "-c", ASK]
        done = subprocess.run(command, input=json.dumps(QUESTIONS), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_files_of_a_hub_data_set_are_one_stream_of_rows(answers: dict[str, Any]) -> None:
    assert answers["two files"] == [[number, row, None] for number, row in enumerate(ROWS, 1)]
    assert answers["three rows"] == answers["two files"][:3]


def test_a_broken_line_of_a_hub_data_set_costs_one_row(answers: dict[str, Any]) -> None:
    assert [problem for _, _, problem in answers["broken line"]] == [None, "broken JSON", *[None] * 6]


def test_what_only_datasets_can_read_is_read_by_it(answers: dict[str, Any]) -> None:
    assert [value for _, value, _ in answers["csv"]] == ROWS[:2]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("slice", "--samples"),
        ("bare name", "no such file here"),
        ("bad name", "owner/name"),
        ("no data", "no data files"),
    ],
)
def test_what_is_no_hub_data_set_is_refused(answers: dict[str, Any], question: str, words: str) -> None:
    assert words in answers[question]


def test_a_full_disk_is_said_with_the_folder_that_is_full() -> None:
    from opensloth.data.sources.hub_errors import explain

    error = RuntimeError("while downloading")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "disk is full" in str(explain("acme/math", error))
    assert "HF_HOME" in str(explain("acme/math", error))
