"""Chat messages of rows: accepted ones, refused ones (by row and message), and prefills with well-known templates."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlinf_lite.data import DataError

# The templates of Qwen2.5 (without tools), SmolLM2 and Llama 3, as the models' tokenizer_config.json have them.
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant" and not message.tool_calls) %}'
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_SYSTEM, SMOLLM2_SYSTEM = (f"<|im_start|>system\nYou are {name}.<|im_end|>\n" for name in ("Qwen", "SmolLM"))
CHATML = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
ASK, BEGIN = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "I think: "}


@pytest.fixture
def prompts(load, jsonl, chat_tokenizer, monkeypatch):
    def render(*chats, template: str | None = None, **changes) -> list[str]:
        if template is not None:
            monkeypatch.setattr(chat_tokenizer, "chat_template", template)
        path = jsonl([{"prompt": chat, "answer": "2"} for chat in chats])
        loaded = load(path, tokenizer=chat_tokenizer, apply_chat_template=True, **changes)
        return [problem.prompt for problem in loaded.problems]

    return render


def refusal(prompts, *chats, **changes) -> str:
    with pytest.raises(DataError) as caught:
        prompts(*chats, **changes)
    return str(caught.value).partition("train.jsonl:")[2]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_prompt_of_one_system_message_comes_once(prompts, role):
    assert prompts([{"role": role, "content": "1+1="}]) == [f"{role[0]}:1+1=;a:"]
    assert prompts([{"role": role, "content": "1+1="}], prompt_template="{prompt}?") == [f"{role[0]}:1+1=?;a:"]


@pytest.mark.parametrize("chat", [[{"role": "system", "content": "0"}], [ASK, {"role": "system", "content": "0"}, ASK]])
def test_a_second_system_prompt_is_refused_wherever_the_first_is(prompts, chat):
    message = refusal(prompts, chat, system_prompt="1")
    assert message == "1: the prompt has a system message of its own; set data.system_prompt=null"


def test_few_shot_examples_need_a_user_message(prompts):
    message = refusal(prompts, [{"role": "system", "content": "0"}], few_shot=[{"question": "1", "answer": "2"}])
    assert message.startswith("1: the prompt has no message of the user") and "data.few_shot" in message


@pytest.mark.parametrize(("template", "before"), [(QWEN, QWEN_SYSTEM + CHATML), (SMOLLM2, SMOLLM2_SYSTEM + CHATML)])
def test_a_last_message_of_the_assistant_is_continued(prompts, template, before):
    assert prompts([ASK, BEGIN], [ASK], template=template) == [f"{before}I think: ", before]


def test_llama_3_trims_the_prefill(prompts):
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    before = f"<bos>{header.format('user')}1+1=<|eot_id|>{header.format('assistant')}"
    assert prompts([ASK, BEGIN], [ASK], template=LLAMA3) == [f"{before}I think:", before]


def test_the_prompt_template_goes_around_the_question_not_the_prefill(prompts):
    chat = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}, ASK, BEGIN]
    assert prompts(chat, prompt_template="<{prompt}>") == ["u:0;a:1;u:<1+1=>;a:I think: "]
    assert prompts([BEGIN]) == ["a:I think: "]
    assert "add a message of the user" in refusal(prompts, [BEGIN], prompt_template="<{prompt}>")


def test_a_template_that_drops_the_prefill_is_refused_by_row(prompts):
    drops = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}a:"
    message = refusal(prompts, [ASK], [ASK, BEGIN], template=drops)
    assert message.startswith("2: the tokenizer's chat template refuses this prompt (continue_final_message is set but")
    assert message.endswith("; it ends with a message of the assistant, which is to be continued")


def test_a_role_that_the_template_does_not_name_is_refused(prompts):
    chat = [{"role": "narrator", "content": "0"}, ASK]
    assert "has the role 'narrator', which the tokenizer's chat template does not name" in refusal(prompts, chat)
    knows = "{% for m in messages %}{% if m.role == 'narrator' %}n:{% endif %}{{ m.content }}{% endfor %}"
    assert prompts(chat, template=knows) == ["n:01+1="]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "1: the prompt is an empty list of messages"),
        (["hi"], "1: message 1 is str, not an object with role and content"),
        ([ASK, None], "1: message 2 is null, not an object"),
        ([{"content": "1"}], "1: message 1 has no role, only content; write"),
        ([{"from": "human", "value": "1"}], "1: message 1 has no role, only from, value; write"),
        ([{"role": 3, "content": "1"}], "1: message 1 has no role that is text (3)"),
        ([{"role": "user"}], "1: message 1 has the content null, not text"),
        ([{"role": "user", "content": None}], "1: message 1 has the content null, not text"),
        ([{"role": "user", "content": 5}], "1: message 1 has the content int, not text"),
        ([{"role": "human", "content": "1"}], "1: message 1 has the role 'human'; write 'user'"),
        ([ASK, {"role": "gpt", "content": "1"}], "1: message 2 has the role 'gpt'; write 'assistant'"),
        ([{"role": "User", "content": "1"}], "1: message 1 has the role 'User'; write 'user'"),
        ([{"role": "user", "content": " \n"}], "1: message 1 (role 'user') is empty"),
        ([{"role": "user", "content": ""}, BEGIN], "1: message 1 (role 'user') is empty"),
        ([ASK, {"role": "assistant", "content": ""}], "1: message 2 (role 'assistant') is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}], "1: message 1 (role 'user') is empty"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "1: message 1 has a part of its content of type",
        ),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, ASK], "1: message 2 has tool_calls"),
    ],
)
def test_invalid_messages_are_refused(prompts, chat, message):
    assert refusal(prompts, chat).startswith(message)


def test_text_parts_are_joined_and_other_fields_dropped(prompts):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1=", "url": None}]
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": parts, "name": "Ann", "tool_calls": None}]
    assert prompts(chat) == ["s:;u:1+1=;a:"]


def test_a_tool_message_keeps_its_place(prompts):
    chat = [ASK, {"role": "assistant", "content": "add"}, {"role": "tool", "content": "2", "tool_call_id": "x"}]
    assert prompts(chat, prompt_template="{prompt}!") == ["u:1+1=!;a:add;t:2;a:"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_messages_stored_as_json_text(load, tmp_path, chat_tokenizer, ending):
    path, text = tmp_path / f"rows.{ending}", json.dumps([ASK, BEGIN])
    if ending == "jsonl":
        path.write_text(json.dumps({"prompt": text, "answer": "2"}))
    elif ending == "csv":
        path.write_text('prompt,answer\n"' + text.replace('"', '""') + '",2\n')
    else:
        pq.write_table(pa.Table.from_pylist([{"prompt": text, "answer": "2"}]), path)
    loaded = load(str(path), tokenizer=chat_tokenizer, apply_chat_template=True)
    assert loaded.problems[0].prompt == "u:1+1=;a:I think: "
    with pytest.raises(DataError, match=r":[12]: the prompt is a list of chat messages; set data.apply_chat_template"):
        load(str(path))


@pytest.mark.parametrize("text", [str([ASK]), json.dumps([ASK])[:-1], json.dumps([ASK]) + "x"])
def test_text_that_looks_like_messages_but_is_not_json_is_refused(prompts, text):
    message = refusal(prompts, text)
    assert message.startswith("1: the prompt begins like a list of messages, but is not JSON (")
    assert "json.dumps" in message


def test_text_in_other_brackets_is_a_question(prompts):
    assert prompts("[1, 2] + [3]", '[{"a": 1}] is?') == ["u:[1, 2] + [3];a:", 'u:[{"a": 1}] is?;a:']
