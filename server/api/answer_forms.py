"""The form an answer is to have, in OpenAI's, vLLM's and llama.cpp's request fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from offramp.server.api.fields import RequestModel, Text
from offramp.server.errors import InvalidRequest
from offramp.server.text.grammars import Form

if TYPE_CHECKING:
    from offramp.server.api.schemas import GenerationBody

MAX_CHOICES: Final = 1000
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


class JsonSchema(RequestModel):
    """A named schema, as OpenAI's ``response_format`` holds it."""

    name: Annotated[Text, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    description: Text | None = None
    # A field named schema would hide a method of pydantic's.
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool = True


class ResponseFormat(RequestModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def form(self, param: str) -> Form | None:
        """The form asked for; raises InvalidRequest."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Form("json_schema", _ANY_OBJECT)
        if self.json_schema is None:
            raise InvalidRequest(
                "A format of type json_schema needs 'json_schema'.",
                param=f"{param}.json_schema",
                code="missing_required_parameter",
            )
        return Form("json_schema", self.json_schema.schema_ or _ANY_OBJECT)


Choices = Annotated[
    list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)
]


class StructuredOutputs(RequestModel):
    """VLLM's ``structured_outputs``."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    def forms(self, param: str) -> Iterator[tuple[str, Form]]:
        """Each form that is asked for, with the field that does."""
        if self.json_ is not None:
            yield f"{param}.json", Form("json_schema", self.json_)
        if self.regex is not None:
            yield f"{param}.regex", Form("regex", self.regex)
        if self.choice is not None:
            yield f"{param}.choice", Form("choice", tuple(self.choice))
        if self.grammar is not None:
            yield f"{param}.grammar", Form("grammar", self.grammar)
        if self.json_object:
            yield f"{param}.json_object", Form("json_schema", _ANY_OBJECT)


def wished_form(body: GenerationBody) -> tuple[Form | None, str]:
    """The form of the answer a request asks for, None if it is free, and the field that asks.

    Raises InvalidRequest where several fields ask.
    """
    wishes = list(_wishes(body))
    if len(wishes) > 1:
        raise InvalidRequest(
            f"'{wishes[0][0]}' and '{wishes[1][0]}' exclude each other.", param=wishes[1][0]
        )
    return (wishes[0][1], wishes[0][0]) if wishes else (None, "response_format")


def _wishes(body: GenerationBody) -> Iterator[tuple[str, Form]]:
    if body.response_format is not None:
        form = body.response_format.form("response_format")
        if form is not None:
            yield "response_format", form
    if body.structured_outputs is not None:
        yield from body.structured_outputs.forms("structured_outputs")
    for name, kind in (
        ("guided_json", "json_schema"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("json_schema", "json_schema"),
        ("grammar", "grammar"),
    ):
        value = getattr(body, name)
        if value is not None:
            yield name, Form(kind, value)
