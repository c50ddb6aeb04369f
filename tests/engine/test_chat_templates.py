"""Contents of conversations reach a chat template in a form that it keeps."""

import json
from types import SimpleNamespace

import pytest

from sglite.engine.chat_templates import ChatTemplates
from sglite.engine.conversations import render_conversations
from sglite.engine.prompt_reader import PromptReader
from sglite.engine.tokenizer import Tokenizer
from tests.checkpoints import make_tokenizer


def each(body):
    """A template that has something for each message, and a bar behind it."""
    return "{% for message in messages %}" + body + "|{% endfor %}"


_ROLE = "{{ message.role }}:"
_PARTS = (
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}"
)
_FILTERED = (
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}"
    "{% endfor %}"
)
_IF_STRING = "{% if message.content is string %}{{ message.content }}{% else %}"
_ADDED = each("{{ message.role + ':' + message.content }}")
_LOOP = each(_ROLE + _PARTS)
#: By what they do with contents.
TEMPLATES = {
    # Takes parts only, as those of LLaVA and SmolVLM.
    "loop over parts": _LOOP,
    "filter of parts": each(_ROLE + _FILTERED),
    # Takes strings only.
    "prints lists": each(_ROLE + "{{ message.content }}"),
    "prints lists as JSON": each(_ROLE + _IF_STRING + "{{ message.content | tojson }}{% endif %}"),
    "stumbles over lists": _ADDED,
    "leaves lists out": each(_ROLE + _IF_STRING + "{% endif %}"),
    "takes both": each(_ROLE + _IF_STRING + _PARTS + "{% endif %}"),
    # As Pixtral's.
    "parts of users, strings of others": each(
        "{% if message.role == 'user' %}user:" + _PARTS + "{% else %}"
        "{{ message.role + ':' + message.content }}{% endif %}"
    ),
}


def part(text):
    return {"type": "text", "text": text}


def rendered(template, messages, **options):
    """The prompt that a model of text makes of a conversation."""
    hf = make_tokenizer()
    hf.chat_template = template
    tokenizer = Tokenizer(hf)
    reader = PromptReader(tokenizer, "Model")
    tools = options.pop("tools", None)
    (prompt,), is_single = render_conversations(tokenizer, reader, "m", messages, tools, options)
    assert is_single
    return prompt.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_forms_say_the_same_in_every_role(name):
    said = {"system": "be kind", "user": "Hi", "assistant": "yes", "tool": "7"}
    roles = ["system", "user", "assistant", "user", "tool"]
    expected = "".join(f"{role}:{said[role]}|" for role in roles)
    strings = [{"role": role, "content": said[role]} for role in roles]
    listed = [{"role": role, "content": [part(said[role])]} for role in roles]
    assert rendered(TEMPLATES[name], strings) == expected
    assert rendered(TEMPLATES[name], listed) == expected
    assert rendered(TEMPLATES[name], [strings[0], listed[1], strings[2], *listed[3:]]) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_parts_are_one_behind_the_other(name):
    messages = [{"role": "user", "content": [part("a 'b' "), "c", part(" d")]}]
    assert rendered(TEMPLATES[name], messages) == "user:a 'b' c d|"


def test_a_template_that_prints_messages_whole_has_them_as_they_are():
    for content in ("Hi", [part("Hi")]):
        messages = [{"role": "user", "content": content}]
        assert json.loads(rendered("{{ messages | tojson }}", messages)) == messages


def test_messages_without_a_text_stay_as_they_are():
    template = each("{{ message.content }}{{ message.tool_calls | length }}")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert rendered(template, messages) in ("1|", "None1|")


def test_a_template_of_the_call_is_tried_as_well():
    messages = [{"role": "user", "content": "Hi"}]
    assert rendered(_ADDED, messages, chat_template=_LOOP) == "user:Hi|"


def test_one_of_several_by_name():
    several = {"default": _LOOP, "tool_use": "{{ tools | length }}" + _ADDED}
    function = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for content in ("Hi", [part("Hi")]):
        messages = [{"role": "user", "content": content}]
        assert rendered(several, messages) == "user:Hi|"
        assert rendered(several, messages, tools=[function]) == "1user:Hi|"


def test_a_template_is_tried_once():
    calls = []

    def apply(messages, **arguments):
        calls.append(messages)
        return "".join(message["content"] for message in messages)

    hf = SimpleNamespace(chat_template="any", apply_chat_template=apply)
    tokenizer = SimpleNamespace(hf=hf, apply_chat_template=apply)
    templates = ChatTemplates(tokenizer)
    for _ in range(3):
        adapted = templates.adapt([{"role": "user", "content": [part("Hi")]}], "any", None)
        assert adapted == [{"role": "user", "content": "Hi"}]
    assert len(calls) == 2
