"""`os-data show`, in the terminal and as HTML."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from opensloth.config.jobs import DataJob
from opensloth.data.prepared.prepare import prepare
from opensloth.data.prepared.summary import summarize
from opensloth.data.show.html import page
from opensloth.data.show.terminal import show, summary_table, terminal
from opensloth.data.show.view import histogram, pieces, view
from opensloth.errors import UserError
from tiny import tiny_tokenizer

EVIL = "\x1b]0;owned\x07 <script>alert(1)</script> <img src=http://x.example/y onerror=z> \x1b[31mred"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shown")
    questions = ["How many clips?", EVIL, *(f"{'How much is it? ' * (n % 9)}{n}" for n in range(40))]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "It is 7."}] for q in questions]
    lines = [json.dumps({"messages": messages}) for messages in turns] + ["{broken"]
    (directory / "rows.jsonl").write_text("\n".join(lines))
    return prepare(
        DataJob(input=str(directory / "rows.jsonl"), model=str(model), output=directory / "out", gpus=2, workers=1)
    )


def printed(renderable, **options):
    console = Console(width=200, highlight=False, soft_wrap=True, **options)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_trained_tokens_are_green_and_masked_ones_dim(prepared):
    shown = printed(
        terminal(view(prepared.directory, 0, 1, False)), force_terminal=True, color_system="standard", no_color=False
    )
    assert "\x1b[32mIt is 7.<|im_end|>" in shown
    assert "\x1b[2m<|im_start|>user" in shown


def test_without_colours_trained_tokens_stand_between_marks(prepared, capsys):
    show(prepared.directory, n=1)
    shown = capsys.readouterr().out
    assert "What is trained stands between ⟦ and ⟧." in shown
    assert shown.count("⟦It is 7.<|im_end|>⟧") == 1
    assert "\x1b" not in shown


def test_the_terminal_shows_lengths_packs_drops_and_rows(prepared):
    shown = printed(terminal(view(prepared.directory, None, 2, False)))
    for expected in ("42 of 43", "Tokens of a row", "Tokens of a pack", "line 43: ", "2 of ", "█"):
        assert expected in shown
    assert shown.count("trained (train split") == 2


def test_pieces_together_are_the_row_s_text(prepared):
    tokenizer = tiny_tokenizer()
    for shown in view(prepared.directory, None, 42, False).rows:
        row = prepared.rows.row(prepared.rows.find(shown.row_id))
        assert "".join(piece.text for piece in shown.pieces) == tokenizer.decode(row.input_ids)
        assert [piece.text for piece in shown.pieces if piece.trained] == ["It is 7.<|im_end|>"]


def test_a_piece_keeps_the_blank_it_starts_with():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("How many clips did Natalia sell").input_ids
    cut = len(ids) // 2
    shown = pieces(tokenizer, ids, [False] * cut + [True] * (len(ids) - cut))
    assert "".join(piece.text for piece in shown) == "How many clips did Natalia sell"
    assert [piece.trained for piece in shown] == [False, True]


def test_control_characters_of_the_data_do_not_reach_the_terminal(prepared, capsys):
    shown = printed(terminal(view(prepared.directory, 1, 1, False)))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\\x1b]0;owned\\x07" in shown


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_html_of_the_data_is_escaped_and_nothing_external_is_named(prepared):
    html = page(view(prepared.directory, 1, 1, False))
    parser = Tags()
    parser.feed(html)
    assert "script" not in parser.tags
    assert "img" not in parser.tags
    assert "link" not in parser.tags
    assert {name for name, _ in parser.attributes} <= {"lang", "charset", "http-equiv", "content", "class", "style"}
    assert "<script>alert(1)</script>" in parser.text, "shown as text"
    assert "url(" not in html
    assert "\x1b" not in html


def test_the_html_file_is_whole_and_says_what_the_terminal_says(prepared, tmp_path, capsys):
    show(prepared.directory, n=2, html=tmp_path / "data.html")
    parser = Tags()
    parser.feed((tmp_path / "data.html").read_text("utf-8"))
    for name, value in summarize(prepared).lines():
        assert name in parser.text
        assert value in parser.text
    assert "It is 7.<|im_end|>" in parser.text
    assert str(tmp_path / "data.html") in capsys.readouterr().err


def test_an_unwritable_html_file_is_an_error(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        show(prepared.directory, html=tmp_path / "file" / "data.html")


def test_show_prints_on_stdout(prepared, capsys):
    show(prepared.directory, n=1)
    assert "Tokens of a pack" in capsys.readouterr().out


def test_a_row_is_found_by_its_id(prepared):
    assert [row.row_id for row in view(prepared.directory, 1, 3, False).rows] == [1]


def test_a_row_that_was_dropped_is_an_error(prepared):
    with pytest.raises(UserError, match="has no row 42"):
        view(prepared.directory, 42, 1, False)


def test_a_model_whose_tokenizer_changed_is_an_error(prepared, model, tmp_path):
    kept = (model / "tokenizer.json").read_bytes()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(model)
    try:
        with pytest.raises(UserError, match="another tokenizer"):
            view(prepared.directory, None, 1, False)
    finally:
        (model / "tokenizer.json").write_bytes(kept)


def test_figures_need_no_model(prepared, model, tmp_path):
    model.rename(tmp_path / "away")
    try:
        assert view(prepared.directory, None, 0, False).rows == []
    finally:
        (tmp_path / "away").rename(model)


def test_the_summary_table_names_the_directory(prepared):
    assert str(prepared.directory) in printed(summary_table(summarize(prepared)))


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=300))
def test_a_histogram_counts_every_value_once_in_its_range(values):
    bars = histogram(np.array(values))
    assert len(bars) <= 12
    assert [sum(bar.low <= value <= bar.high for value in values) for bar in bars] == [bar.count for bar in bars]
    assert sum(bar.count for bar in bars) == len(values)
