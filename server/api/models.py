"""GET /v1/models and /v1/models/{id}."""

from typing import Any, Final

from fastapi import APIRouter

from offramp.models.exits.points import points_under
from offramp.models.sampling_params import KVFill
from offramp.server.api.context import Context, Shared
from offramp.server.api.openapi import errors
from offramp.server.errors import ModelNotFound

router = APIRouter(tags=["Models"])

# Codex takes its prompt from here where its user names no other; its own is longer than the context
# of a small model.
_CODEX_PROMPT: Final = (
    "You are a coding agent. Use the tools you are given to read, run and change files, one step "
    "at a time, until the task is done. Then say briefly what you did."
)


@router.get("/v1/models")
async def list_models(context: Shared) -> dict[str, Any]:
    """The served model under each of its names, once more as Codex reads it."""
    names = context.model_names
    return {
        "object": "list",
        "data": [_card(context, name) for name in names],
        "models": [_codex(context, name, place) for place, name in enumerate(names)],
    }


@router.get("/v1/models/{model_id:path}", responses=errors([ModelNotFound]))
async def retrieve_model(model_id: str, context: Shared) -> dict[str, Any]:
    """One of the names; 404 for any other."""
    context.check_model(model_id)
    return _card(context, model_id)


def _card(context: Context, name: str) -> dict[str, Any]:
    info, criterion = context.driver.info, context.config.exit_criterion
    fill = KVFill(context.config.kv_fill)
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "offramp",
        "root": info.model_name,
        "max_model_len": info.max_model_len,
        "num_layers": info.num_layers,
        "exit_layers": list(info.exit_layers),
        "exit_qualities": sorted(
            {each.quality for each in points_under(info.points, criterion, fill)}
        ),
        "draft_head": info.draft_head,
        "decision_tasks": {
            name: {
                "question": task.wording,
                "answers": list(task.labels),
                "qualities": sorted({point.quality for point in task.points}),
            }
            for name, task in info.decision_tasks.items()
        },
    }


def _codex(context: Context, name: str, priority: int) -> dict[str, Any]:
    """What Codex must be told of a model (its ModelInfo); it reads a list with less not at all."""
    context_window = context.driver.info.max_model_len
    return {
        "slug": name,
        "id": name,
        "display_name": name,
        "priority": priority,
        "visibility": "list",
        "supported_in_api": True,
        "base_instructions": _CODEX_PROMPT,
        "shell_type": "shell_command",
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
        "context_window": context_window,
        # Longer outputs of tools are cut, so that several fit.
        "truncation_policy": {"mode": "tokens", "limit": context_window // 4},
        "supported_reasoning_levels": [],
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "supports_parallel_tool_calls": True,
    }
