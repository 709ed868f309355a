"""Chat templates in their process: their texts are transformers' own, and what they take ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from offramp.server.errors import InvalidRequest, ServerError
from offramp.server.text.rendering import Renderer, TemplateRefused
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import byte_backend, serving

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}},
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is <b>this</b>? \u20ac \ud800 "},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": {"at": "ä", "n": 1}}}
        ],
    },
    {"role": "tool", "content": "a cat", "tool_call_id": "1"},
    {"role": "assistant", "content": "A cat.", "reasoning_content": "hm", "name": None},
    {"role": "user", "content": "Sure?"},
]
# How families write: ChatML, Llama 2 and 3, Mistral, Qwen 3 with tools and thoughts.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = "
        "'<<SYS>>' ~ messages[0].content ~ '<</SYS>>' %}{% else %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
        "m.content.strip() + ' [/INST]' }}{% elif m.content %}{{ ' ' + m.content | trim + ' ' + "
        "eos_token }}{% endif %}{% if loop.index0 % 2 == 0 %} {% endif %}{% endfor %}"
    ),
    "llama3": (
        "{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
        "{{- bos_token }}Today: {{ date[-4:] }}\n{%- for m in messages %}{%- if m.tool_calls is "
        'defined and m.tool_calls %}{%- set call = m.tool_calls[0].function %}{{- \'{"name": "\' '
        "+ call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}"
        "{%- else %}{{- '<|h|>' + m.role + '<|/h|>\\n\\n' + m.content | trim }}{%- endif %}"
        "{%- endfor %}{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}"
    ),
    "mistral": (
        "{%- set ns = namespace(index=0, found=false) %}{%- set user = messages | "
        "selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}{%- for m in messages %}"
        "{%- if m.role == 'tool' %}{%- set ns.found = true %}{%- continue %}{%- endif %}"
        "{%- set ns.index = ns.index + 1 %}{{- '[' ~ ns.index ~ '/' ~ user | length ~ ']' }}"
        "{%- endfor %}{{ ns.found }}{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}"
        "{{ twice(messages[-1]['content']) }}"
    ),
    "qwen3": (
        "{%- if tools %}{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}"
        "{{- tool | tojson }}{%- endfor %}{%- endif %}{%- for m in messages[::-1] %}"
        "{%- set at = (messages | length - 1) - loop.index0 %}{{- at ~ m.role }}{%- if "
        "m.reasoning_content is string %}{{- '<think>\\n' + m.reasoning_content.strip('\\n') + "
        "'\\n</think>' }}{%- endif %}{%- endfor %}{%- if enable_thinking is defined and "
        "enable_thinking is false %}{{- '<think>\\n\\n</think>' }}{%- endif %}"
        "{%- for tool in tools or [] %}{%- for k, v in tool.function.items() %}{{ k ~ '=' ~ v }}"
        "{% endfor %}{% endfor %}"
    ),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": [TOOL], "enable_thinking": False},
    {"add_generation_prompt": False, "documents": None},
)

DOUBLES = (
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    own = Renderer()
    yield own
    own.close()


def folder(path: Path, template: str | dict[str, str], backend: Any = None) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend or byte_backend(), eos_token="<end>", bos_token="<end>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    loaded = Tokenizer.load(folder(tmp_path, TEMPLATES[name]))
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for options in OPTIONS:
        wanted = {"add_generation_prompt": True, **options}
        for talk in (TALK, HELLO):
            text = own.apply_chat_template(talk, tokenize=False, **wanted)
            assert loaded.render_chat(talk, options) == text


def test_an_answer_is_continued_and_templates_have_names(tmp_path: Path) -> None:
    templates = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["qwen3"]}
    loaded = Tokenizer.load(folder(tmp_path, templates))
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    talk = [*HELLO, {"role": "assistant", "content": "Well, "}]
    ways: tuple[dict[str, Any], ...] = (
        {"continue_final_message": True, "add_generation_prompt": False},
        {"tools": [TOOL], "add_generation_prompt": True},
    )
    for options in ways:
        text = own.apply_chat_template(talk, tokenize=False, **options)
        assert loaded.render_chat(talk, options) == text


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ (10 ** (10 ** 8)) % 7 }}", "processor time"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ ('a' * 100000) is in('b' * 100000000) }}{{ 'x' * 2000000000 }}", "memory"),
        (DOUBLES, "memory"),
        ("{{ '%0999999999d' % 1 }}", "memory"),
        ("{{ messages | tojson(indent=99999999) }}", "memory"),
        ("{{ 'x' | center(20000000) }}", "characters"),
        ("{{ ('x' * 40) | wordwrap(1) | replace('x', 'y' * 9999999) }}", "memory"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "(nested|recursion|process)"),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ],
)  # fmt: skip
def test_templates_that_do_harm_are_refused(template: str, told: str, renderer: Renderer) -> None:
    with pytest.raises(TemplateRefused, match=told):
        renderer.render(template, HELLO, {})
    # The next conversation does not notice.
    assert renderer.render("{{ messages[0].content }}", HELLO, {}) == "Hello"


def test_a_worker_that_is_ended_is_replaced(renderer: Renderer) -> None:
    for ended in ("child", "process"):
        assert renderer.render("a", HELLO, {}) == "a"
        process = renderer._process
        assert process is not None
        own = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(own) if ended == "child" else process.pid, signal.SIGKILL)
        # The end may be seen with the next request only, which then fails.
        with contextlib.suppress(ServerError):
            assert renderer.render("b", HELLO, {}) == "b"
        assert renderer.render("c", HELLO, {}) == "c"


@pytest.fixture
def hostile(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(folder(tmp_path, "{{ (10 ** (10 ** 8)) % 7 }}"))


@pytest.fixture
def panics(tmp_path: Path) -> Tokenizer:
    """Its regular expression gives up after many steps back."""
    backend = byte_backend()
    backend.pre_tokenizer = Split(Regex("(a+)+b"), "isolated")
    return Tokenizer.load(folder(tmp_path, "{{ messages[0].content }}", backend))


async def test_the_server_lives_beside_a_template_that_takes_all_of_its_time(
    hostile: Tokenizer,
) -> None:
    async with serving() as server:
        server.context.tokenizer = hostile
        asked = [
            server.client.chat.completions.with_raw_response.create(
                model="fake", messages=[{"role": "user", "content": "hi"}]
            )
            for _ in range(2)
        ]
        chats = asyncio.gather(*asked, return_exceptions=True)
        for _ in range(20):
            answer = await server.client.completions.create(model="fake", prompt="a")
            assert answer.choices[0].text
        assert not chats.done()
        for error in await chats:
            assert getattr(error, "status_code", None) == 400
            assert getattr(error, "code", None) == "template_past_limits"


async def test_a_tokenizer_that_panics_is_an_error_of_the_api(panics: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="cannot encode"):
        panics.encode(["a" * 40], 1000)
    async with serving() as server:
        server.context.tokenizer = panics
        with pytest.raises(Exception, match="cannot encode") as caught:
            await server.client.completions.create(model="fake", prompt="a" * 40)
    assert getattr(caught.value, "code", None) == "not_encodable"
