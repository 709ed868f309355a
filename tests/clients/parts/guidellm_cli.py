"""A short load of guidellm: eight chats, two at a time."""

from __future__ import annotations

import json

from tests.clients.parts.checks import MODEL, ORIGIN, WORK, check, program, run

COUNT = 8


@check("load")
def load() -> str:
    prompts = WORK / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"Tell me about the number {n}.", "output_tokens_count": 16})
        for n in range(COUNT)
    ]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    target = WORK / "report.json"
    options = {
        "backend": f"kind=openai_http,target={ORIGIN},model={MODEL}",
        "profile": "kind=concurrent,streams=2",
        "constraint": f"kind=max_requests,count={COUNT}",
        "data": f"kind=json_file,path={prompts}",
        "output": f"kind=json,path={target}",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    done = program(
        "guidellm", "run", "--disable-console", *words, timeout_s=100, HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr[-400:]
    benchmark = json.loads(target.read_text(encoding="utf-8"))["benchmarks"][0]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == COUNT, totals
    assert totals["errored"] == 0, totals
    return f"{totals['successful']} chats, none failed"


run()
