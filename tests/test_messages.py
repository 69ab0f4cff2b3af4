import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensloth.data.messages.examples import BadRow, Example, RowFormat, detect_format, parse_mapping
from opensloth.data.messages.formats import ROLES, SHAPES
from opensloth.errors import UserError


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def example(row: dict[str, Any], *maps: str, method: str = "sft") -> Example:
    return detect_format(list(row), parse_mapping(maps), method).example(row)


def reason(format_of: dict[str, Any], row: dict[str, Any]) -> str:
    """Why `row` is bad in a file whose rows look like `format_of`."""
    with pytest.raises(BadRow) as caught:
        detect_format(list(format_of), {}).example(row)
    return caught.value.reason


def talk(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [turn(role, content) for role, content in turns]}


ONE_OF_EACH: dict[str, dict[str, Any]] = {
    "messages": talk(("user", "q"), ("assistant", "a")),
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "openmath": {"problem": "q", "generated_solution": "a", "expected_answer": "7"},
    "prompt-solution": {"prompt": "q", "solution": "a"},
    "problem-answer": {"problem": "q", "answer": "a"},
    "gsm8k": {"question": "q", "answer": "#### 7"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", list(ONE_OF_EACH))
def test_each_format_is_told_by_its_columns(name: str) -> None:
    row = ONE_OF_EACH[name]
    row_format = detect_format(["id", *row], {})
    assert row_format.name == name
    assert pickle.loads(pickle.dumps(row_format)) == row_format
    found = row_format.example(row)
    assert found.completion_format == name
    if name == "text":
        assert (found.messages, found.text) == ((), "a")
    else:
        reply = "#### 7" if name == "gsm8k" else "a"
        assert found.messages == (turn("user", "q"), turn("assistant", reply))


def test_every_format_has_a_case_here() -> None:
    assert set(ONE_OF_EACH) == set(SHAPES)


def test_openmath_rows_lose_their_think_marks_in_the_working_alone() -> None:
    source = "<think>\nOne and one.\n</think>\n\nSo \\boxed{2}. "
    found = example({"problem": "1+1?", "generated_solution": source, "expected_answer": " 2 "})
    assert found.working == "One and one.\n\n\nSo \\boxed{2}."
    assert found.answer == "2"
    assert found.messages[-1]["content"] == source


def test_gsm8k_rows_are_split_at_the_last_mark_and_lose_their_calculations() -> None:
    source = "It costs 2*3=$<<2*3=6>>6. See #### 1.\nThen <<6+1=7>>7\n#### 1,007"
    found = example({"question": "How much?", "answer": source})
    assert found.working == "It costs 2*3=$6. See #### 1.\nThen 7"
    assert found.answer == "1,007"
    assert found.messages == (turn("user", "How much?"), turn("assistant", source))


def test_dapo_prompts_may_be_lists_of_turns() -> None:
    found = example({"prompt": [turn("system", "Be brief."), turn("user", "q")], "solution": 34})
    assert found.messages == (turn("system", "Be brief."), turn("user", "q"), turn("assistant", "34"))
    assert (found.working, found.answer) == (None, "34")
    bad = {"prompt": [turn("user", "q"), turn("assistant", "a")], "solution": "34"}
    assert reason(bad, bad) == "wrong order of roles"


def test_a_solution_beside_problem_and_answer_is_the_working() -> None:
    found = example({"problem": "q", "solution": "<think>Because.</think>", "answer": "7"})
    assert (found.working, found.answer) == ("Because.", "7")
    assert found.messages[-1]["content"] == "<think>Because.</think>"


@pytest.mark.parametrize(
    ("value", "text"), [(63, "63"), (63.0, "63"), (0.5, "0.5"), (" 63\n", "63"), (10**30, "1" + "0" * 30)]
)
def test_a_number_is_an_answer(value: Any, text: str) -> None:
    assert example({"problem": "q", "answer": value}).answer == text


@pytest.mark.parametrize("value", [True, [63], {"a": 1}])
def test_other_types_are_no_answer(value: Any) -> None:
    row = {"problem": "q", "answer": value}
    assert reason(row, row) == "wrong type: answer"


def test_alpaca_input_follows_the_instruction_and_may_be_empty() -> None:
    assert example({"instruction": "Sum up.", "input": "Text.", "output": "T."}).messages[0]["content"] == (
        "Sum up.\n\nText."
    )
    for empty in ("", " ", None):
        row = {"instruction": "Sum up.", "input": empty, "system": empty, "output": "T."}
        assert example(row).messages == (turn("user", "Sum up."), turn("assistant", "T."))
    assert len(example({"instruction": "q", "output": "a"}).messages) == 2


def test_a_system_column_is_the_system_turn_unless_the_conversation_has_one() -> None:
    assert example({"prompt": "q", "completion": "a", "system": "S"}).messages[0] == turn("system", "S")
    assert example(talk(("user", "q"), ("assistant", "a")) | {"system": "S"}).messages[0] == turn("system", "S")
    own = example(talk(("system", "own"), ("user", "q"), ("assistant", "a")) | {"system": "S"})
    assert [t["content"] for t in own.messages] == ["own", "q", "a"]


def test_an_empty_system_turn_counts_as_none() -> None:
    for empty in ("", "  ", None):
        found = example(talk(("system", empty), ("user", "q"), ("assistant", "a")))
        assert found.messages == (turn("user", "q"), turn("assistant", "a"))


def test_conversations_know_the_names_of_sharegpt_and_of_openai() -> None:
    given = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": "call"},
        {"from": "observation", "value": ""},
        {"from": "gpt", "value": "a", "weight": None},
    ]
    roles = [t["role"] for t in example({"conversations": given}).messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert example({"conversations": [turn("User", "q"), turn("assistant", "a")]}).messages[0] == turn("user", "q")


def test_tool_turns_and_calls_are_kept_as_they_are() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}]
    given = [
        turn("user", "1+1?", name=None),
        turn("assistant", None, tool_calls=calls),
        turn("tool", "2", name="add", tool_call_id="x"),
        turn("tool", "", name="add", tool_calls=[]),
        turn("assistant", "It is 2.", tool_calls=None),
    ]
    assert example({"messages": given}).messages == (
        turn("user", "1+1?"),
        turn("assistant", "", tool_calls=calls),
        turn("tool", "2", name="add", tool_call_id="x"),
        turn("tool", "", name="add"),
        turn("assistant", "It is 2."),
    )


def test_text_parts_are_joined_and_pictures_refused() -> None:
    parts = [{"type": "text", "text": "Look "}, {"type": "text", "text": "here"}]
    assert example(talk(("user", parts), ("assistant", "a"))).messages[0]["content"] == "Look here"
    picture = talk(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a"))
    assert reason(picture, picture) == "wrong type: messages.content"


def test_turns_may_be_json_text_as_csv_has_them() -> None:
    text = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    assert example({"messages": text}).messages == (turn("user", "q"), turn("assistant", "a"))
    turns = ['{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}']
    assert example({"messages": turns}).messages == (turn("user", "q"), turn("assistant", "a"))


def test_turns_after_the_last_assistant_turn_are_cut() -> None:
    found = example(talk(("user", "q"), ("assistant", "a"), ("user", "and?")))
    assert found.messages == (turn("user", "q"), turn("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": []}, "empty field: messages"),
        ({"messages": None}, "empty field: messages"),
        ({"messages": "hello"}, "wrong type: messages"),
        ({"messages": "[broken"}, "wrong type: messages"),
        ({"messages": {"role": "user"}}, "wrong type: messages"),
        ({"messages": ["hello"]}, "wrong type: messages"),
        ({"messages": [{"content": "q"}]}, "missing field: messages.role"),
        ({"messages": [{"role": 1, "content": "q"}]}, "wrong type: messages.role"),
        ({"messages": [{"role": "user"}]}, "empty field: messages.content"),
        (talk(("user", 7), ("assistant", "a")), "wrong type: messages.content"),
        (talk(("user", " \n"), ("assistant", "a")), "empty field: messages.content"),
        (talk(("user", "q"), ("assistant", "")), "empty field: messages.content"),
        (talk(("user", "q")), "no assistant turn"),
        (talk(("system", "s"), ("user", "q")), "no assistant turn"),
        (talk(("system", "")), "no assistant turn"),
        (talk(("wizard", "q"), ("assistant", "a")), "unknown role"),
        (talk(("assistant", "a")), "wrong order of roles"),
        (talk(("system", "s"), ("assistant", "a")), "wrong order of roles"),
        (talk(("user", "q"), ("user", "q"), ("assistant", "a")), "wrong order of roles"),
        (talk(("user", "q"), ("assistant", "a"), ("assistant", "a")), "wrong order of roles"),
        (talk(("user", "q"), ("system", "s"), ("assistant", "a")), "wrong order of roles"),
        (talk(("user", "q"), ("tool", "t"), ("assistant", "a")), "wrong order of roles"),
        (talk(("user", "q"), ("assistant", "a"), ("tool", "t"), ("user", "q")), "wrong order of roles"),
        ({"prompt": "q", "completion": "a"}, "another row format: prompt-completion"),
        ({"note": "x"}, "missing field: messages"),
        ({}, "missing field: messages"),
    ],
)
def test_bad_conversations_have_a_reason(row: dict[str, Any], why: str) -> None:
    assert reason({"messages": 0}, row) == why


@pytest.mark.parametrize(
    ("shape", "row", "why"),
    [
        ("gsm8k", {"question": "q", "answer": "It is 7."}, "no #### before the final answer"),
        ("gsm8k", {"question": "q", "answer": "It is 7.\n#### "}, "empty field: answer"),
        ("gsm8k", {"question": "", "answer": "#### 7"}, "empty field: question"),
        ("gsm8k", {"question": None, "answer": "#### 7"}, "empty field: question"),
        ("gsm8k", {"question": "q"}, "missing field: answer"),
        ("gsm8k", {"question": ["q"], "answer": "#### 7"}, "wrong type: question"),
        ("openmath", {"problem": "q", "generated_solution": "<think></think>", "expected_answer": "7"}, "empty field"),
        ("openmath", {"problem": "q", "generated_solution": "a", "expected_answer": ""}, "empty field"),
        ("openmath", {"problem": "q", "generated_solution": "a", "expected_answer": None}, "empty field"),
        ("problem-answer", {"problem": "q", "answer": float("nan")}, "empty field: answer"),
        ("alpaca", {"instruction": "q", "input": 7, "output": "a"}, "wrong type: input"),
        ("alpaca", {"instruction": "q", "input": "", "output": "\t"}, "empty field: output"),
        ("text", {"text": 7}, "wrong type: text"),
        ("text", {"text": ""}, "empty field: text"),
        ("text", {"messages": []}, "another row format: messages"),
    ],
)
def test_bad_fields_have_a_reason(shape: str, row: dict[str, Any], why: str) -> None:
    assert reason(ONE_OF_EACH[shape], row).startswith(why)


def test_a_map_gives_other_columns_their_roles() -> None:
    row = {"query": "q", "reply": "a", "text": "t"}
    assert example(row, "prompt=query", "completion=reply").messages == (turn("user", "q"), turn("assistant", "a"))
    row = {"question": "q", "working": "w", "final": 7}
    found = example(row, "problem=question", "generated-solution=working", "expected_answer=final")
    assert (found.working, found.answer, found.messages[0]["content"]) == ("w", "7", "q")
    assert reason_of_mapped({"question": "q", "final": None}) == "empty field: final"


def reason_of_mapped(row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as caught:
        example(row, "problem=question", "answer=final")
    return caught.value.reason


def test_a_mapped_column_no_longer_plays_its_own_role() -> None:
    assert detect_format(["question", "answer", "text"], {"text": "answer"}).name == "text"
    assert detect_format(["problem", "solution"], {"answer": "solution"}) == (
        RowFormat("problem-answer", {"problem": "problem", "answer": "solution"})
    )


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["query", "response"], "--map prompt=query --map completion=response"),
        (["Question", "Answer"], "--map question=Question --map answer=Answer"),
        (["problem", "final_answer"], "--map answer=final_answer"),
        (["prompt", "label", "target"], "--map completion=target"),
        (["conversation", "id"], "--map messages=conversation"),
        (["content"], "--map text=content"),
    ],
)
def test_unknown_columns_are_listed_with_the_formats_and_the_nearest_map(columns: list[str], hint: str) -> None:
    with pytest.raises(UserError) as caught:
        detect_format(columns, {})
    message = str(caught.value)
    assert hint in message
    assert all(word in message for word in (*columns, "gsm8k (question, answer)"))
    maps = [word for word in message.replace(". ", " ").split() if "=" in word]
    assert detect_format(columns, parse_mapping(maps)), "the suggestion works"


def test_columns_like_nothing_known_get_no_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        detect_format(["x1", "x2"], {})
    assert "--map" not in caught.value.hint


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["question"], "role=column"),
        (["=x"], "role=column"),
        (["problme=x"], "Did you mean problem?"),
        (["text=a", "text=b"], "two columns"),
    ],
)
def test_a_wrong_map_is_refused(pairs: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_mapping(pairs)
    assert words in str(caught.value)


def test_a_map_to_a_column_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        detect_format(["question", "answer"], {"problem": "questoin"})
    assert "Did you mean question?" in str(caught.value)


def test_grpo_takes_only_formats_that_hold_an_answer() -> None:
    both = ["messages", "problem", "answer"]
    assert detect_format(both, {}).name == "messages"
    assert detect_format(both, {}, method="grpo").name == "problem-answer"
    with pytest.raises(UserError) as caught:
        detect_format(["messages"], {}, method="grpo")
    assert "with an answer" in str(caught.value)


texts = st.text(min_size=1).filter(lambda text: not text.isspace())
exchanges = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@given(exchanges, st.none() | texts)
def test_a_good_conversation_comes_out_as_it_went_in(turns: list[tuple[str, str]], system: str | None) -> None:
    given_turns = [turn("system", system)] if system is not None else []
    for asked, replied in turns:
        given_turns += [turn("user", asked), turn("assistant", replied)]
    found = example({"messages": given_turns}).messages
    assert found == tuple(given_turns)
    sharegpt = {"system": "system", "user": "human", "assistant": "gpt"}
    renamed = [{"from": sharegpt[t["role"]], "value": t["content"]} for t in given_turns]
    assert example({"conversations": renamed}).messages == found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
likely_turns = st.fixed_dictionaries(
    {},
    optional={key: json_values | st.sampled_from(["user", "gpt", "tool", "x"]) for key in ("role", "content", "from")},
)
fields = json_values | st.lists(likely_turns | json_values, max_size=4)


@settings(max_examples=300)
@given(st.sampled_from(list(ONE_OF_EACH)), st.dictionaries(st.sampled_from(ROLES), fields))
def test_any_row_is_an_example_or_a_bad_row(name: str, row: dict[str, Any]) -> None:
    row_format = detect_format(list(ONE_OF_EACH[name]), {})
    complete = ONE_OF_EACH[name] | row
    for candidate in (row, complete):
        try:
            found = row_format.example(candidate)
        except BadRow:
            continue
        assert found.text or found.messages[-1]["role"] == "assistant"
        assert all(isinstance(t["content"], str) for t in found.messages)


@given(texts, st.from_regex(r"-?[0-9]{1,6}", fullmatch=True))
def test_gsm8k_working_and_answer_are_found_in_any_text(working: str, answer: str) -> None:
    found = example({"question": "q", "answer": f"{working}\n#### {answer}"})
    assert found.answer == answer
    assert found.messages[-1]["content"] == f"{working}\n#### {answer}"
