"""The parts of `make test-clients`: which client, in which environment, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field

CLIENT = "client"
JUDGE = "judge"


@dataclass(frozen=True, slots=True)
class Part:
    """A script of parts/ and how it is run.

    ``environment`` names a file of requirements/, a .txt for pip or a .json for npm; ``package``
    is the one whose version the report gives. ``against_peers`` is false for what tests a route
    or a description that only Offramp has.
    """

    name: str
    kind: str
    script: str
    environment: str
    package: str
    timeout_s: float
    settings: dict[str, str] = field(default_factory=dict)
    against_peers: bool = True


PARTS = (
    Part("openai-python 3", CLIENT, "openai_python.py", "openai-3.txt", "openai", 120),
    Part("openai-python 2", CLIENT, "openai_python.py", "openai-2.txt", "openai", 120),
    Part("openai-node", CLIENT, "openai_node.mjs", "openai-node.json", "openai", 120),
    Part("ai-sdk", CLIENT, "ai_sdk.mjs", "ai-sdk.json", "ai", 120),
    Part("langchain-openai", CLIENT, "langchain.py", "langchain.txt", "langchain-openai", 120),
    Part("litellm", CLIENT, "litellm_python.py", "litellm.txt", "litellm", 120),
    Part("llm", CLIENT, "llm_cli.py", "llm.txt", "llm", 120),
    Part("anthropic-python", CLIENT, "anthropic_python.py", "anthropic.txt", "anthropic", 120),
    Part("codex", CLIENT, "codex_cli.py", "codex.json", "@openai/codex", 150),
    Part("lm_eval", CLIENT, "lm_eval_logprobs.py", "lm-eval.txt", "lm_eval", 180),
    Part("guidellm", CLIENT, "guidellm_cli.py", "guidellm.txt", "guidellm", 120),
    Part(
        "llm-comply openai-chat",
        JUDGE,
        "llm_comply_judge.py",
        "llm-comply.txt",
        "llm-comply",
        240,
        {"FORMAT": "openai-chat"},
    ),
    Part(
        "llm-comply open-responses",
        JUDGE,
        "llm_comply_judge.py",
        "llm-comply.txt",
        "llm-comply",
        240,
        {"FORMAT": "open-responses"},
    ),
    Part(
        "llm-comply anthropic",
        JUDGE,
        "llm_comply_judge.py",
        "llm-comply.txt",
        "llm-comply",
        240,
        {"FORMAT": "anthropic"},
    ),
    Part("compatcanary", JUDGE, "compatcanary_judge.py", "compatcanary.json", "compatcanary", 240),
    Part(
        "schemathesis own",
        JUDGE,
        "schemathesis_judge.py",
        "schemathesis.txt",
        "schemathesis",
        300,
        {"SPEC": "own"},
        against_peers=False,
    ),
    Part(
        "schemathesis openai",
        JUDGE,
        "schemathesis_judge.py",
        "schemathesis.txt",
        "schemathesis",
        300,
        {"SPEC": "openai"},
    ),
    Part(
        "schemathesis anthropic",
        JUDGE,
        "schemathesis_judge.py",
        "schemathesis.txt",
        "schemathesis",
        300,
        {"SPEC": "anthropic"},
    ),
    Part(
        "tool-eval-bench",
        JUDGE,
        "tool_eval_judge.py",
        "tool-eval-bench.txt",
        "tool-eval-bench",
        300,
    ),
)
