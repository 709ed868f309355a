"""The command `llm` with models from its file of further OpenAI-compatible ones."""

from __future__ import annotations

import json
import subprocess

import yaml

from tests.clients.parts.checks import BASE_URL, MODEL, PROMPT, WORK, check, program, run

ENTRIES = {
    "here-chat": {"supports_schema": True, "supports_tools": True},
    "here-completion": {"completion": True},
    "here-responses": {"responses": True, "supports_tools": True},
}
(WORK / "extra-openai-models.yaml").write_text(
    yaml.safe_dump(
        [
            {"model_id": name, "model_name": MODEL, "api_base": BASE_URL, **entry}
            for name, entry in ENTRIES.items()
        ]
        + [{"model_id": "here-wrong", "model_name": "no-such-model", "api_base": BASE_URL}]
    ),
    encoding="utf-8",
)


def llm(*words: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command; raises where its status is not the expected one."""
    done = program("llm", *words, timeout_s=60, LLM_USER_PATH=str(WORK))
    assert (done.returncode != 0) == fails, done.stderr[-300:] or done.stdout[-300:]
    return done


GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "24")


@check("chat")
def chat() -> None:
    assert llm("-m", "here-chat", *GREEDY, "--no-stream", PROMPT).stdout.strip()


@check("stream")
def stream() -> str:
    done = llm("-m", "here-chat", *GREEDY, "--usage", PROMPT)
    assert done.stdout == llm("-m", "here-chat", *GREEDY, "--no-stream", PROMPT).stdout
    assert "output" in done.stderr, done.stderr
    return done.stderr.strip()


@check("completion")
def completion() -> None:
    done = llm("-m", "here-completion", *GREEDY, "The capital of France is")
    assert "Paris" in done.stdout, done.stdout


@check("unknown model")
def unknown_model() -> str:
    return llm("-m", "here-wrong", *GREEDY, "--no-stream", PROMPT, fails=True).stderr.strip()


@check("tools offered")
def tools_offered() -> None:
    """The command cannot require a call; a model may answer without one."""
    function = 'def upper(text: str) -> str:\n    "Upper case."\n    return text.upper()'
    llm("-m", "here-chat", *GREEDY, "--no-stream", "--functions", function, PROMPT)
    llm("-m", "here-chat", *GREEDY, "--functions", function, PROMPT)


@check("json schema")
def json_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    done = llm("-m", "here-chat", "-o", "max_tokens", "100", "--schema", json.dumps(schema), PROMPT)
    assert json.loads(done.stdout)["city"] in {"Paris", "Rome"}


@check("responses")
def responses() -> None:
    assert llm("-m", "here-responses", *GREEDY, "--no-stream", PROMPT).stdout.strip()


@check("responses, streamed")
def responses_streamed() -> None:
    assert llm("-m", "here-responses", *GREEDY, PROMPT).stdout.strip()


run()
