import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvarto.cluster.text.chat_template import ChatTemplate
from kvarto.protos.errors import InvalidRequestError

USER = [{"role": "user", "content": "Grüße & <tags> \"quoted\""}]
CONVERSATION = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "ok"}, *USER]
TOOLS = [{"type": "function", "function": {"name": "füße", "parameters": {"b": 1, "a": [True, None]}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks_and_whitespace": "{{ bos_token }}\n  {% for m in messages %}\n    {{ m.content | trim }}{{ eos_token }}\n"
                             "  {% endfor %}\nend",
    "tojson": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':')) }}",
    "loop_controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
                     "{% break %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
                 "{{ ns.n }}{{ dict(a=1) }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}"
                  "{% endfor %}",
    "variables": "{{ 'think' if enable_thinking else 'no' }}{{ undefined_one }}{{ documents is none }}"
                 "{{ tools is none }}",
    "date": "{{ strftime_now('%Y') }}",
    "macro": "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
}


def render(source, messages=USER, **options):
    options = {"add_generation_prompt": True, "tools": None, "variables": {}} | options
    sources = source if isinstance(source, dict) else {"default": source}
    return ChatTemplate(sources, TOKENS).render(messages, **options)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("messages", [USER, CONVERSATION])
@pytest.mark.parametrize(("tools", "prompt"), [(None, True), (TOOLS, False)])
def test_output_is_that_of_transformers(name, messages, tools, prompt):
    expected, _ = render_jinja_template([messages], chat_template=TEMPLATES[name], tools=tools,
                                        add_generation_prompt=prompt, enable_thinking=True, **TOKENS)
    assert render(TEMPLATES[name], messages, tools=tools, add_generation_prompt=prompt,
                  variables={"enable_thinking": True}) == expected[0]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"


def test_null_fields_look_absent():
    messages = [{"role": "assistant", "content": None, "tool_calls": None}]
    assert render("{{ messages[0].content is defined }}{{ 'tool_calls' in messages[0] }}", messages) == "FalseFalse"


def test_arguments_of_tool_calls_are_parsed():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", messages) == '{"x": 1}'
    assert call["function"]["arguments"] == '{"x": 1}'


def test_tool_use_template_is_taken_for_tools_only():
    sources = {"default": "plain", "tool_use": "tools"}
    assert render(sources) == "plain"
    assert render(sources, tools=TOOLS) == "tools"


@pytest.mark.parametrize(("messages", "message"), [
    ([], "at least one message"),
    ("hi", "must be a list"),
    ({"role": "user"}, "must be a list"),
    (["hi"], r"messages\[0\] must be an object"),
    ([{"content": "hi"}], r"messages\[0\].role"),
    ([*USER, {"role": 1, "content": "hi"}], r"messages\[1\].role"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content must be"),
    ([{"role": "user", "content": ["hi"]}], r"messages\[0\].content\[0\]"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'; this model takes text only"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
    ([{"role": "assistant", "tool_calls": 3}], "tool_calls must be a list"),
    ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments is not JSON"),
])
def test_malformed_messages_are_refused_with_their_place(messages, message):
    with pytest.raises(InvalidRequestError, match=message) as info:
        render(TEMPLATES["chatml"], messages)
    assert info.value.param == "messages"


def test_refusal_of_the_template_is_passed_on():
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{{ messages[0].content + no.field }}", "{{ 1 / 0 }}", "{{ messages[0] + 1 }}"])
def test_failure_of_the_template_is_an_invalid_request(source):
    with pytest.raises(InvalidRequestError, match="chat template"):
        render(source)


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% set ns = namespace(__class__=1) %}",
    "{{ namespace.__init__.__globals__ }}"])
def test_template_cannot_reach_out_of_its_sandbox(source):
    with pytest.raises(InvalidRequestError):
        render(source)


def test_damaged_template_is_named_with_its_line():
    with pytest.raises(InvalidRequestError, match="line 2"):
        render("a\n{% if %}")


def test_model_without_a_template_says_what_to_do():
    with pytest.raises(InvalidRequestError, match=r"chat_template\.jinja"):
        render({})


def test_model_with_only_named_templates_lists_them():
    with pytest.raises(InvalidRequestError, match="rag"):
        render({"rag": "x"})


def test_variables_cannot_replace_what_the_request_says():
    with pytest.raises(InvalidRequestError, match="messages cannot be given"):
        render("x", variables={"messages": []})


def test_tools_must_be_objects():
    with pytest.raises(InvalidRequestError, match="tools must be"):
        render("x", tools=["f"])
