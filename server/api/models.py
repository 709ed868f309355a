"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter

from offramp.server.api.context import Context, Shared
from offramp.server.api.openapi import errors
from offramp.server.errors import ModelNotFound

router = APIRouter(tags=["Models"])


@router.get("/v1/models")
async def list_models(context: Shared) -> dict[str, Any]:
    """The served model under each of its names."""
    return {"object": "list", "data": [_card(context, name) for name in context.model_names]}


@router.get("/v1/models/{model_id:path}", responses=errors([ModelNotFound]))
async def retrieve_model(model_id: str, context: Shared) -> dict[str, Any]:
    """One of the names; 404 for any other."""
    context.check_model(model_id)
    return _card(context, model_id)


def _card(context: Context, name: str) -> dict[str, Any]:
    info = context.driver.info
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "offramp",
        "root": info.model_name,
        "max_model_len": info.max_model_len,
        "num_layers": info.num_layers,
        "exit_layers": list(info.exit_layers),
        "draft_head": info.draft_head,
        "decision_tasks": {
            name: {"question": task.wording, "answers": list(task.labels)}
            for name, task in info.decision_tasks.items()
        },
    }
