"""One turn of `codex exec` with a provider from its configuration file."""

from __future__ import annotations

import json

from tests.clients.parts.checks import BASE_URL, MODEL, WORK, check, program, run

# Short instructions and few tools: its own ones are longer than the model's context.
CONFIG = f"""
model = "{MODEL}"
model_provider = "here"
model_context_window = 8192
model_instructions_file = "instructions.md"
approval_policy = "never"
sandbox_mode = "read-only"
web_search = "disabled"

[features]
goals = false

[agents]
enabled = false

[analytics]
enabled = false

[model_providers.here]
name = "here"
base_url = "{BASE_URL}"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


@check("responses, streamed")
def turn() -> str:
    home, folder = WORK / "home", WORK / "folder"
    home.mkdir()
    folder.mkdir()
    (home / "config.toml").write_text(CONFIG, encoding="utf-8")
    (home / "instructions.md").write_text("Answer in one short sentence.\n", encoding="utf-8")
    done = program(
        "codex",
        "exec",
        "--skip-git-repo-check",
        "--json",
        "-C",
        str(folder),
        "Say hello.",
        timeout_s=120,
        CODEX_HOME=str(home),
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kinds = [event["type"] for event in events]
    failed = [event for event in events if event["type"] in {"turn.failed", "error"}]
    assert not failed, json.dumps(failed[-1])
    assert done.returncode == 0, done.stderr[-300:]
    assert "turn.completed" in kinds, kinds
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    texts = [item["text"] for item in items if item["type"] == "agent_message"]
    assert texts, items
    usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
    assert usage["output_tokens"] > 0, usage
    return f"{usage['input_tokens']} tokens of prompt"


run()
