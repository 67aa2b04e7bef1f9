from __future__ import annotations

import datetime
import json
import re

import pytest

from mlxtx.errors import MlxtxError
from mlxtx.text.chat_template import ChatTemplate, plain_transcript

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi <b>&"é"'},
]


def render(source: str, messages=MESSAGES, **options) -> str:
    return ChatTemplate({"default": source}).render(messages, **options)


def test_turns_and_generation_prompt():
    source = (
        "{% for message in messages %}\n"
        "    {{ '[' + message.role + ']' + message['content'] }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    body = '[system]Be brief.\n[user]Hi <b>&"é"\n'
    assert render(source) == _indented(body) + "[assistant]"
    assert render(source, add_generation_prompt=False) == _indented(body)


def _indented(body: str) -> str:
    """Blocks are trimmed, expressions keep the blanks before them."""
    return "".join("    " + line for line in body.splitlines(keepends=True))


PARTS = """
    {%- for message in messages %}{{ message.role }}:
    {%- for part in message['content'] if part['type'] == 'image' %}<picture>{% endfor %}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
        {{- part['text'] }};
    {%- endfor %}
    {%- endfor %}
    {%- if add_generation_prompt %}assistant:{% endif %}"""


def test_a_template_that_knows_lists_of_parts_only_gets_lists_of_parts():
    """Given a text, such a template goes through its letters and finds no part among them."""
    answered = [*MESSAGES, {"role": "assistant", "content": "Ho"}]
    expected = 'system:Be brief.;user:Hi <b>&"é";assistant:Ho;assistant:'
    assert render(PARTS, answered) == expected
    always = "{{ bos_token + '' }}{% if tools is not none %}{{ tools | tojson }}{% endif %}"
    assert render(always + PARTS, answered, bos_token="<s>") == "<s>" + expected
    pictured = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    assert render(PARTS, [*answered, pictured]) == expected[:-10] + "user:<picture>What?;assistant:"


def test_a_template_that_knows_texts_too_gets_texts():
    either = "{% for m in messages %}{{ m.content is string }}{{ m.content }}{% endfor %}"
    assert render(either, MESSAGES[:1]) == "TrueBe brief."
    neither = "{% for m in messages %}{{ m.role }}{{ m.content is string }}{% endfor %}"
    assert render(neither, MESSAGES[:1]) == "systemTrue"


def test_tojson_keeps_text_as_it_is():
    assert render("{{ messages[1].content | tojson }}") == json.dumps(
        MESSAGES[1]["content"], ensure_ascii=False
    )
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}") == json.dumps(
        {"a": [2], "b": 1}, indent=2
    )


def test_strftime_now_is_today():
    today = datetime.datetime.now().strftime("%Y-%m-%d")
    assert render("{{ strftime_now('%Y-%m-%d') }}") == today


def test_loop_controls_and_namespace():
    source = (
        "{% set found = namespace(role='') %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set found.role = m.role %}{% break %}{% endif %}{% endfor %}"
        "{{ found.role }}"
    )
    assert render(source) == "user"


def test_generation_tag_is_transparent():
    assert render("a{% generation %}{{ messages[0].role }}{% endgeneration %}b") == "asystemb"


def test_raise_exception_is_one_line():
    with pytest.raises(MlxtxError, match=r"refused these messages: only users here$"):
        render("{{ raise_exception('only users here') }}")


GROWING = "{{% set ns = namespace(x='ab') %}}{{% for i in range(99) %}}{{% set ns.x = ns.{} %}}{{% endfor %}}"


def test_counting_changes_no_loop():
    source = (
        "{% for m in messages if m.role %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} "
        "{% endfor %}{% for x in nothing %}{% else %}none{% endfor %}"
        "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}"
    )
    assert render(source) == "1/2False 2/2True none123"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "error in line 1"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages + 1 }}", "failed on these messages"),
        ("{{ 1 // 0 }}", "failed on these messages"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
        ("{% break %}", "'break' outside loop"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "more than 2,000,000 steps",
        ),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
            "{{ m(30) }}",
            "more than 2,000,000 steps",
        ),
        (GROWING.format("x ~ ns.x"), "a text that is too long"),
        (GROWING.format("x + ns.x"), "a text that is too long"),
        ("{% for i in range(99) %}{{ 'x' * 1000000 }}{% endfor %}", "a text that is too long"),
        (
            "{% macro m() %}{% for i in range(99) %}{{ 'x' * 1000000 }}{% endfor %}{% endmacro %}"
            "{{ m() | length }}",
            "a text that is too long",
        ),
        *(
            ("{{ " + long + " }}", "a text that is too long")
            for long in (
                "'x' | center(99999999)",
                "'x' | center(width=99999999)",
                "'x'.ljust(99999999)",
                "'x' | indent(99999999)",
                "'\t'.expandtabs(99999999)",
                "'7'.zfill(99999999)",
                "('x' * 1000000) | replace('x', 'y' * 1000)",
                "('x' * 1000000).replace('x', 'y' * 1000)",
                "'%99999999d' % 1",
                "'%*d' % (99999999, 1)",
                "'%99999999d' | format(1)",
                "'{:99999999}'.format(1)",
                "'{:{}}'.format(1, 99999999)",
                "('%s' * 100) % (('x' * 1000000,) * 100)",
            )
        ),
    ],
)
def test_broken_templates_are_one_line(source, message):
    with pytest.raises(MlxtxError, match=message) as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() | length }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ 'a' * 100000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ range(100000000) | list | length }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_templates_stay_in_the_sandbox(source):
    with pytest.raises(MlxtxError):
        render(source)


def test_a_caller_s_object_never_reaches_the_template():
    class Evil:
        def __str__(self) -> str:
            return "boo"

    with pytest.raises(MlxtxError, match="plain JSON"):
        render("{{ messages[0].content }}", [{"role": "user", "content": Evil()}])


def test_named_templates():
    template = ChatTemplate({"default": "d", "tool_use": "t", "rag": "r"})
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert template.render(MESSAGES) == "d"
    assert template.render(MESSAGES, tools=tools) == "t"
    assert template.render(MESSAGES, name="rag") == "r"
    with pytest.raises(MlxtxError, match=re.escape("default, tool_use, rag")):
        template.render(MESSAGES, name="other")


def test_variables_reach_the_template():
    source = "{{ bos_token }}{{ 'on' if enable_thinking else 'off' }}{{ tools is none }}"
    assert render(source, bos_token="<s>", enable_thinking=True) == "<s>onTrue"


def test_texts_are_changed_as_ever():
    """What is looked at for its length is then done as jinja2 does it."""
    source = (
        "{{ 'a' | center(3) }}|{{ 'a\nb' | indent(2) }}|{{ 'aba' | replace('a', 'c', 1) }}|"
        "{{ 'aba'.replace('a', 'c') }}|{{ '%s: %03d%%' | format('x', 7) }}|{{ '%(k)5s' % {'k': 1} }}|"
        "{{ '{{\"n\": {:>3}}}'.format(1) }}|{{ 7 % 4 }}|{{ 'a'.ljust(2) }}|{{ 'a b'.split() }}"
    )
    assert render(source) == (" a |a\n  b|cba|cbc|x: 007%|    1|{\"n\":   1}|3|a |['a', 'b']")


def test_documents_are_none_unless_given():
    source = "{% if documents is not none %}{{ documents[0].text }}{% else %}none{% endif %}"
    assert render(source) == "none"
    assert render(source, documents=[{"text": "a page"}]) == "a page"


def test_plain_transcript():
    assert plain_transcript([{"role": "assistant", "tool_calls": []}], False) == "assistant: \n"
    assert plain_transcript(MESSAGES[:1]) == "system: Be brief.\nassistant:"
    assert plain_transcript(MESSAGES[:1], False) == "system: Be brief.\n"
