"""What all formats share: finding one by name or from rows, and the rules of a conversation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import formats
from lora_kit.errors import DataError, RecipeError
from lora_kit.formats import UnusableRow, conversation, message_of, text_of, tool_calls_of, tools_of
from lora_kit.types import Message

NAMES = ["alpaca", "bfcl", "messages", "prompt_completion", "python_docstrings", "sharegpt", "text", "two_party"]


def turns(*roles: str) -> list[Message]:
    return [Message(role=role, content=f"{role} says") for role in roles]


def reason_of(function, *args, **kwargs) -> str:
    with pytest.raises(UnusableRow) as caught:
        function(*args, **kwargs)
    return caught.value.reason


def test_the_formats_are_the_files_of_the_folder():
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")} - {"__init__"}
    assert formats.names() == sorted(files) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_example_is_detected_as_itself_only_and_gives_a_conversation(name):
    example = formats.load(name).EXAMPLE
    assert [other for other in NAMES if formats.load(other).fits(example)] == [name]
    assert formats.detect([example], "rows.jsonl") == name
    read = formats.load(name).to_conversation(example, "rows.jsonl:1")
    assert read.origin == "rows.jsonl:1"
    assert read.messages[-1].role == "assistant"
    assert read.trains_all == (name == "text")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, 3, "x", [], [3], {}, [[]], [None]])
def test_fits_answers_for_any_kind_of_value(name, value):
    module = formats.load(name)
    for key in module.EXAMPLE:
        assert module.fits({**module.EXAMPLE, key: value}) in (True, False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, 3, "", [3], {}, [[]], [None], [{}]])
def test_a_broken_row_is_unusable_and_never_a_crash(name, value):
    module = formats.load(name)
    for key in module.EXAMPLE:
        try:
            module.to_conversation({**module.EXAMPLE, key: value}, "rows.jsonl:1")
        except UnusableRow as error:
            assert error.reason and len(error.reason) < 40
    with pytest.raises(UnusableRow):
        module.to_conversation({}, "rows.jsonl:1")


def test_an_unknown_format_names_the_nearest_and_all():
    with pytest.raises(RecipeError) as caught:
        formats.load("sharegtp")
    assert "'sharegtp'" in caught.value.what
    assert "did you mean sharegpt?" in caught.value.todo and "two_party" in caught.value.todo
    with pytest.raises(RecipeError):
        formats.load("__init__")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "p", "prompt_id": "1", "messages": [{"role": "user", "content": "p"}]}, "messages"),
        ({"instruction": "i", "input": "", "output": "o", "text": "### i o"}, "alpaca"),
        ({"text": "t", "url": "u", "timestamp": "2019"}, "text"),
        ({"text": None, "prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"conversations": [{"role": "user", "content": "p"}]}, "sharegpt"),
        ({"messages": [[{"sender": "a", "text": "x"}]]}, "two_party"),
        ({"id": 1, "question": [[{"role": "user", "content": "q"}]], "function": []}, "bfcl"),
    ],
)
def test_rows_as_they_occur_are_detected(row, name):
    assert formats.detect([row], "rows.jsonl") == name


def test_a_label_beside_the_text_is_no_plain_text():
    with pytest.raises(DataError) as caught:
        formats.detect([{"text": "hello", "label": "greeting"}], "rows.jsonl")
    assert caught.value.where == "rows.jsonl"
    assert "text, label" in caught.value.what and "prompt_completion" in caught.value.what
    assert caught.value.exit_code == 4


def test_rows_of_two_formats_are_an_error_that_names_both():
    rows = [{"prompt": "p", "completion": "c"}, {"instruction": "i", "output": "o"}]
    with pytest.raises(DataError, match="several formats: alpaca, prompt_completion"):
        formats.detect(rows, "rows.jsonl")
    with pytest.raises(DataError, match="several formats: alpaca, prompt_completion"):
        formats.detect([{**rows[0], **rows[1]}], "rows.jsonl")


def test_one_odd_row_among_many_is_left_to_the_ledger():
    good = {"prompt": "p", "completion": "c"}
    assert formats.detect([{"prompt": "p"}, good, good], "rows.jsonl") == "prompt_completion"
    with pytest.raises(DataError, match="fit no format"):
        formats.detect([{"prompt": "p"}, {"prompt": "p"}, good], "rows.jsonl")


def test_detection_reads_twenty_rows_and_no_more():
    def rows():
        for _ in range(20):
            yield {"text": "t"}
        raise AssertionError("read on")

    assert formats.detect(rows(), "rows.jsonl") == "text"


def test_no_rows_are_an_error():
    with pytest.raises(DataError, match="holds no rows"):
        formats.detect([], "rows.jsonl")


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ("system", "user", "assistant", "user"),
        ("user", "assistant", "user", "assistant"),
    ],
)
def test_turns_in_order_are_kept(roles):
    assert [message.role for message in conversation(turns(*roles), origin="x:1").messages] == list(roles)


@pytest.mark.parametrize(
    "roles",
    [
        ("assistant",),
        ("system", "assistant"),
        ("user", "user", "assistant"),
        ("user", "assistant", "assistant"),
        ("user", "system", "assistant"),
        ("user", "assistant", "system"),
        ("user", "assistant", "tool"),
        ("user", "tool", "assistant"),
        ("system", "system", "user", "assistant"),
    ],
)
def test_turns_out_of_order_are_unusable(roles):
    assert reason_of(conversation, turns(*roles), origin="x:1") == "roles out of order"


def test_a_tool_answers_a_call_and_the_assistant_goes_on():
    call = Message(role="assistant", tool_calls=({"function": {"name": "f", "arguments": {}}},))
    messages = [*turns("user"), call, *turns("tool", "tool", "assistant")]
    assert len(conversation(messages, origin="x:1").messages) == 5
    assert reason_of(conversation, [*turns("user"), call, *turns("tool", "user")], origin="x:1") == "roles out of order"


def test_reasons_of_unusable_turns():
    assert reason_of(conversation, [], origin="x:1") == "no messages"
    assert reason_of(conversation, turns("system", "user"), origin="x:1") == "no assistant turn"
    blank = [Message(role="user", content=" \n"), Message(role="assistant", content="a")]
    assert reason_of(conversation, blank, origin="x:1") == "empty content"
    assert reason_of(conversation, [*turns("user"), Message(role="assistant")], origin="x:1") == "empty content"
    half = [Message(role="user", content="\ud83d"), Message(role="assistant", content="a")]
    assert reason_of(conversation, half, origin="x:1") == "broken characters"


def test_an_empty_system_message_is_kept():
    """It says that there is none, where a template would otherwise put its default."""
    messages = [Message(role="system", content=""), *turns("user", "assistant")]
    assert conversation(messages, origin="x:1").messages[0].content == ""


def test_messages_as_openai_writes_them():
    assert message_of({"role": "developer", "content": "s"}).role == "system"
    assert message_of({"role": "user", "content": "c", "name": "ana", "tool_calls": None}) == Message(
        role="user", content="c", name="ana"
    )
    assert message_of({"role": "tool", "content": "c", "tool_call_id": "7"}).tool_call_id == "7"
    old = message_of({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}})
    assert old.tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {}}},)
    assert message_of({"role": "function", "name": "f", "content": "c"}).role == "tool"


def test_messages_that_are_unusable():
    assert reason_of(message_of, {"role": "narrator", "content": "c"}) == "bad role"
    assert reason_of(message_of, {"role": ["user"], "content": "c"}) == "bad role"
    assert reason_of(message_of, {"content": "c"}) == "bad role"
    assert reason_of(message_of, "hello") == "message is not an object"


@pytest.mark.parametrize(("weight", "read"), [(0, 0), (1, 1), (False, 0), (True, 1), (0.0, 0), (1.0, 1), (None, 1)])
def test_a_weight_says_whether_a_turn_is_trained_on(weight, read):
    message = message_of({"role": "assistant", "content": "c", "weight": weight})
    assert message.weight == read and type(message.weight) is int
    assert message.as_dict() == {"role": "assistant", "content": "c"}
    assert message_of({"role": "assistant", "content": "c"}).weight == 1


@pytest.mark.parametrize("weight", [0.5, 2, -1, "1", [1], float("nan")])
@pytest.mark.parametrize("shape", ["messages", "sharegpt", "prompt_completion"])
def test_any_other_weight_is_an_error_at_its_line(weight, shape):
    answer = {"role": "assistant", "content": "c", "weight": weight}
    record = {
        "messages": {"messages": [{"role": "user", "content": "q"}, answer]},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"},
                                       {"from": "gpt", "value": "c", "weight": weight}]},
        "prompt_completion": {"prompt": "q", "completion": [answer]},
    }[shape]
    with pytest.raises(DataError) as caught:
        formats.load(shape).to_conversation(record, "rows.jsonl:3")
    assert str(caught.value) == (f"rows.jsonl:3: a message has weight {weight!r}; use 0 (not trained on) or 1; "
                                 "data.train[].weight weighs whole sources")


def test_content_in_parts_is_joined_and_pictures_are_unusable():
    assert text_of([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]) == "a b"
    assert text_of(None) is None
    assert reason_of(text_of, [{"type": "image_url", "image_url": {"url": "x"}}]) == "content is not text"
    assert reason_of(text_of, [{"type": "image", "text": "caption"}]) == "content is not text"
    assert reason_of(text_of, 3) == "content is not text"


def test_arguments_as_string_and_as_object_are_the_same():
    plain = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}
    text = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": [1, null]}"}}
    assert tool_calls_of([text]) == tool_calls_of([plain]) == (plain,)
    assert tool_calls_of("{\"name\": \"f\", \"arguments\": \"{}\"}") == (
        {"type": "function", "function": {"name": "f", "arguments": {}}},
    )
    assert tool_calls_of(None) == tool_calls_of([]) == ()


@pytest.mark.parametrize("call", [{"function": {"name": "f", "arguments": "{\"x\":"}}, {"name": 3}, "f(x)", [["f"]],
                                  {"name": "f", "arguments": "[1]"}])
def test_broken_tool_calls(call):
    assert reason_of(tool_calls_of, call) == "broken tool call"


def test_tools_bare_wrapped_and_as_json():
    wrapped = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert tools_of([wrapped]) == tools_of([wrapped["function"]]) == (wrapped,)
    assert tools_of("[{\"name\": \"f\", \"parameters\": {\"type\": \"object\"}}]") == (wrapped,)
    assert tools_of(None) == tools_of("") == ()
    for broken in ("[{", {"name": "f"}, [{}], ["x"], 3):
        assert reason_of(tools_of, broken) == "broken tools"


def test_formats_and_readers_load_without_torch():
    code = (
        "import sys; from lora_kit import formats, records; [formats.load(name) for name in formats.names()];"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
