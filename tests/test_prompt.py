"""The prompt contract: which template, what it renders, where it is cut, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensloth.cli.prepared import check_tokenizer
from opensloth.data.messages.examples import BadRow, Example
from opensloth.data.models.resolve import tokenizer_digest
from opensloth.data.prompt.choose import (
    REASONING_SYSTEM,
    REASONING_TAGS,
    PromptContract,
    check_same,
    contract_for,
)
from opensloth.data.tokens.encode import encoder_of
from opensloth.errors import UserError
from templates import FORGETTING, OPENING, STRICT, TOOLS, TRIMMING
from tiny import CHATML, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many apples?"}
ANSWER = {"role": "assistant", "content": "12 apples."}
EOS = "<|im_end|>"


def contract(template: str | None = CHATML, choice: str = "auto", **options) -> PromptContract:
    return contract_for(tiny_tokenizer(template), choice, **options)


def trained(of: PromptContract, messages: list[dict]) -> list[str]:
    return [segment.text for segment in of.segments(messages) if segment.trained]


def reasoned(working: str, answer: str) -> dict:
    return {"role": "assistant", "content": REASONING_TAGS.turn(working, answer)}


# Which contract


def test_auto_takes_the_tokenizers_template_and_says_that_it_was_inferred() -> None:
    made = contract()
    assert (made.name, made.tags, made.stop, made.system) == ("inferred", None, (EOS,), None)
    assert made.render([USER], add_generation_prompt=True) == tiny_tokenizer().apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False
    )


def test_auto_prefers_the_adapters_contract(tmp_path: Path) -> None:
    contract(choice="reasoning").save(tmp_path / "prompt.json")
    made = contract(adapter=tmp_path)
    assert made == contract(choice="reasoning")
    assert contract(adapter=tmp_path, system="Think.").system == "Think."


def test_auto_takes_the_default_of_several_templates() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "default": CHATML}
    assert contract_for(tokenizer).chat_template == CHATML


def test_a_model_without_a_template_is_an_error_that_names_the_others() -> None:
    with pytest.raises(UserError, match=r"no chat template.*chatml, reasoning, or a FILE\.jinja"):
        contract(None)


def test_plain_text_needs_no_template() -> None:
    made = contract(None, text_only=True)
    assert (made.name, made.stop) == ("text", (EOS,))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean reasoning"):
        contract(choice="reasonin")


def test_chatml_needs_its_tokens() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.get_added_vocab = lambda: {}
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(UserError, match=r"chatml needs the token <\|im_start\|>, which this model lacks"):
        contract_for(tokenizer, "chatml")


def test_reasoning_needs_an_end_token() -> None:
    with pytest.raises(UserError, match="reasoning needs the token eos"):
        contract_for(tiny_tokenizer(None, eos_token=None), "reasoning")


def test_a_template_file_is_used_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}")
    made = contract(choice=str(file))
    assert (made.name, made.render([USER])) == ("mine.jinja", f"[How many apples?]{EOS}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "is no jinja template"),
        ("{{ raise_exception('never') }}", "refused by the chat template: never"),
        ("{{ messages[-1].content }}{{ eos_token }}", "drops the user's question"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ eos_token }}",
            "drops the assistant",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "would never stop"),
        ("{% for m in messages %}{{ m.content }}</turn>{% endfor %}", "would never stop"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "refused by the chat template"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(source)
    with pytest.raises(UserError, match=message):
        contract(choice=str(file))


def test_a_missing_template_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        contract(choice=str(tmp_path / "none.jinja"))


# System prompts


NASTY = 'say "hi" \\ {{ 7*7 }} {% raw %} \' \n #} 你好 😀 %}'


@pytest.mark.parametrize("choice", ["auto", "chatml", "reasoning"])
def test_a_given_system_prompt_is_rendered_where_a_conversation_has_none(choice: str) -> None:
    made = contract(choice=choice, system=NASTY)
    assert NASTY in made.render([USER])
    assert made.render([USER]) == made.render([{"role": "system", "content": NASTY}, USER])
    assert NASTY not in made.render([SYSTEM, USER])
    assert made.messages(Example((USER,)))[0]["content"] == NASTY


def test_the_tokenizer_renders_the_contracts_system_prompt_too() -> None:
    tokenizer = tiny_tokenizer()
    made = contract_for(tokenizer, "reasoning")
    tokenizer.chat_template = made.chat_template
    rendered = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert rendered == made.render([USER], add_generation_prompt=True)


def test_a_template_without_a_system_role_refuses_a_system_prompt() -> None:
    with pytest.raises(UserError, match="System role not supported"):
        contract(STRICT, system="Be brief.")


# reasoning


def test_reasoning_renders_as_the_tutorial_says() -> None:
    made = contract(choice="reasoning")
    assert made.system == REASONING_SYSTEM
    assert REASONING_SYSTEM.count("\n") == 3
    assert made.stop == (EOS,)
    conversation = [USER, reasoned("6 + 6 = 12", "12")]
    working = "<start_working_out>6 + 6 = 12<end_working_out><SOLUTION>12</SOLUTION>"
    assert made.render(conversation) == f"{REASONING_SYSTEM}{EOS}How many apples?{working}{EOS}"


@pytest.mark.parametrize(("given", "system"), [([USER], REASONING_SYSTEM), ([SYSTEM, USER], "Be brief.")])
def test_reasoning_keeps_the_question_with_and_without_a_system_turn(given: list[dict], system: str) -> None:
    tokenizer = tiny_tokenizer()
    made = contract_for(tokenizer, "reasoning")
    ids = made.prompt_ids(tokenizer, given)
    assert tokenizer.decode(ids) == f"{system}{EOS}How many apples?<start_working_out>"
    question = tokenizer("How many apples").input_ids
    assert any(ids[i : i + len(question)] == question for i in range(len(ids)))


def test_reasoning_makes_the_turn_from_working_and_answer() -> None:
    made = contract(choice="reasoning")
    example = Example((USER, {"role": "assistant", "content": "<think>6 + 6</think>12"}), "6 + 6", "12")
    assert made.messages(example)[-1] == reasoned("6 + 6", "12")
    assert contract(choice="chatml").messages(example)[-1]["content"] == "<think>6 + 6</think>12"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example((USER, ANSWER)), "assistant turn without the contract's tags"),
        (Example((USER, ANSWER), None, "12"), "answer without working"),
        (Example((USER, ANSWER), "6 <SOLUTION>", "12"), "the contract's tags inside the working or the answer"),
        (Example((USER, {"role": "assistant", "content": "<SOLUTION>12</SOLUTION>"})), "without the contract's tags"),
    ],
)
def test_reasoning_refuses_turns_without_its_tags(example: Example, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        contract(choice="reasoning").messages(example)
    assert reason in bad.value.reason


def test_reasoning_takes_turns_that_have_the_tags() -> None:
    messages = contract(choice="reasoning").messages(Example((USER, reasoned("6 + 6", "12"))))
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_a_grpo_prompt_needs_no_tags() -> None:
    made = contract(choice="reasoning")
    assert made.prompt_messages(Example((USER, ANSWER), None, "12")) == [
        {"role": "system", "content": REASONING_SYSTEM},
        USER,
    ]


# Where the rendering is cut


@pytest.mark.parametrize("choice", ["chatml", "reasoning"])
@pytest.mark.parametrize("with_system", [True, False])
@pytest.mark.parametrize("turns", [1, 3])
def test_shipped_templates_generate_from_a_prefix_of_the_training_row(
    choice: str, with_system: bool, turns: int
) -> None:
    tokenizer = tiny_tokenizer()
    made = contract_for(tokenizer, choice)
    conversation = [SYSTEM] * with_system + [USER, reasoned("(6 + 6", "12")] * turns
    row = ids_of(tokenizer, made, conversation)
    for end in range(len(conversation)):
        if conversation[end]["role"] == "assistant":
            prompt = made.prompt_ids(tokenizer, conversation[:end])
            assert row[: len(prompt)] == prompt
            assert len(prompt) < len(row)


def ids_of(tokenizer, of: PromptContract, messages: list[dict]) -> list[int]:
    pieces = encoder_of(tokenizer).encode([[segment.text for segment in of.segments(messages)]])[0]
    return [token for piece in pieces for token in piece]


def test_every_assistant_turn_is_trained_with_its_end_but_not_the_line_break() -> None:
    made = contract()
    conversation = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "None.\n"}]
    assert trained(made, conversation) == [f"12 apples.{EOS}", f"None.\n{EOS}"]
    segments = made.segments(conversation)
    assert "".join(segment.text for segment in segments) == made.render(conversation)
    assert segments[-1].text == "\n"


def test_full_conversation_trains_the_same_pieces_all() -> None:
    made = contract()
    masked, full = (made.segments([SYSTEM, USER, ANSWER], target_only) for target_only in (True, False))
    assert [segment.text for segment in masked] == [segment.text for segment in full]
    assert all(segment.trained for segment in full)


def test_a_template_that_forgets_thinking_trains_the_last_turn_alone() -> None:
    made = contract(FORGETTING)
    thought = {"role": "assistant", "content": "<think>\n6 + 6\n</think>\n\n12"}
    assert trained(made, [USER, thought, USER, thought]) == [f"<think>\n6 + 6\n</think>\n\n12{EOS}"]


def test_an_empty_thinking_block_is_what_the_model_has_to_write() -> None:
    made = contract(FORGETTING)
    assert trained(made, [USER, ANSWER]) == [f"<think>\n\n</think>\n\n12 apples.{EOS}"]


def test_thinking_that_the_prompt_opens_is_trained_though_the_template_removes_it() -> None:
    made = contract(OPENING)
    thought = {"role": "assistant", "content": "<think>\n6 + 6</think>12"}
    assert trained(made, [USER, thought]) == [f"6 + 6</think>12{EOS}"]
    whole = "".join(segment.text for segment in made.segments([USER, thought]))
    assert whole.startswith(made.render([USER], add_generation_prompt=True))
    with pytest.raises(BadRow, match="does not begin as the generation prompt ends"):
        made.segments([USER, ANSWER])


def test_a_template_that_closes_the_conversation_once_more_trains_every_turn() -> None:
    made = contract(CHATML + "{%- if not add_generation_prompt -%}{{ pad_token }}{%- endif -%}")  # Phi 3's habit
    assert trained(made, [USER, ANSWER, USER, ANSWER]) == [f"12 apples.{EOS}"] * 2
    assert made.segments([USER, ANSWER])[-1].text == "\n<|endoftext|>"


def test_tool_turns_are_context_and_tool_calls_are_trained() -> None:
    made = contract(TOOLS)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 6}}]}
    result = {"role": "tool", "content": "12"}
    texts = trained(made, [USER, call, result, ANSWER])
    assert texts == ['<call>{"name": "add", "arguments": {"a": 6}}</call>' + EOS, f"12 apples.{EOS}"]


def test_a_conversation_that_the_template_refuses_is_a_bad_row() -> None:
    with pytest.raises(BadRow) as bad:
        contract(STRICT).segments([USER, USER, ANSWER])
    assert bad.value.reason == "refused by the chat template: Roles must alternate"
    with pytest.raises(BadRow, match="does not fit the chat template"):
        contract().render([{"role": "user", "content": None}])


def test_a_template_that_writes_the_date_renders_the_same_on_every_day() -> None:
    made = contract_for(tiny_tokenizer(TRIMMING, bos_token="<|endoftext|>"))
    assert made.render([USER]).startswith("<|endoftext|>26 Jul 2024")


texts = st.text(max_size=30).filter(str.strip)
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "forgetting": FORGETTING, "tools": TOOLS}


@st.composite
def conversations(draw, system: bool = True) -> list[dict]:
    found = [{"role": "system", "content": draw(texts)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        found.append({"role": "user", "content": draw(texts)})
        found.append({"role": "assistant", "content": draw(texts)})
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversation=conversations())
@settings(max_examples=40, deadline=None)
def test_segments_together_are_the_rendering_and_end_at_turn_ends(name: str, conversation: list[dict]) -> None:
    made = contract_for(TOKENIZERS[name])
    segments = made.segments(conversation)
    assert "".join(segment.text for segment in segments) == made.render(conversation)
    marked = [segment.text for segment in segments if segment.trained]
    assert marked
    assert all(text.endswith(EOS) for text in marked)
    if name in ("chatml", "tools"):
        assert marked == [m["content"] + EOS for m in conversation if m["role"] == "assistant"]


TOKENIZERS = {name: tiny_tokenizer(source, bos_token="<|endoftext|>") for name, source in TEMPLATES.items()}


# Saved and compared


def test_a_saved_contract_is_the_same_contract(tmp_path: Path) -> None:
    made = contract(choice="reasoning", system=NASTY)
    made.save(tmp_path / "prompt.json")
    loaded = PromptContract.load(tmp_path / "prompt.json")
    assert (loaded, loaded.hash) == (made, made.hash)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": ["</s>"]}, "was changed"),
        ({"version": 99}, "later version"),
        ({"tags": {"begin": "<a>"}}, "holds no prompt contract"),
        ({"version": None}, "holds no prompt contract"),
    ],
)
def test_a_damaged_contract_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "prompt.json"
    contract().save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        PromptContract.load(file)


def test_the_name_is_no_part_of_the_identity() -> None:
    made = contract()
    check_same(made, replace(made, name="other"), tiny_tokenizer())


def test_another_pad_token_is_no_other_contract() -> None:
    assert contract().hash == contract_for(tiny_tokenizer(pad_token=EOS)).hash


def test_another_contract_is_an_error_that_shows_the_first_differing_token() -> None:
    with pytest.raises(UserError) as error:
        check_same(contract(choice="reasoning"), contract(), tiny_tokenizer())
    assert "token 0 of a short conversation is 'You' (id " in error.value.message
    assert "for the adapter, but '<|im_start|>' (id 1) in the data" in error.value.message


def test_contracts_that_render_alike_still_show_what_differs() -> None:
    made = contract()
    with pytest.raises(UserError, match=r"stop is \('<\|im_end\|>',\) for the adapter, but \('</s>',\)"):
        check_same(made, replace(made, stop=("</s>",)), tiny_tokenizer())
    with pytest.raises(UserError, match="their templates part at character"):
        check_same(made, replace(made, chat_template=made.chat_template + "{# more #}"), tiny_tokenizer())


def test_an_adapter_is_not_trained_on_data_of_another_contract(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tokenizer = tiny_tokenizer()
    for directory in (base, adapter):
        tokenizer.save_pretrained(directory)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    contract(choice="reasoning").save(adapter / "prompt.json")

    manifest = SimpleNamespace(model=str(base), tokenizer_digest=tokenizer_digest(tokenizer))
    job = SimpleNamespace(model=str(adapter), revision=None, trust_remote_code=False)
    check_tokenizer(job, SimpleNamespace(manifest=manifest, contract=contract(choice="reasoning")))
    with pytest.raises(UserError, match="token 0 of a short conversation"):
        check_tokenizer(job, SimpleNamespace(manifest=manifest, contract=contract()))
