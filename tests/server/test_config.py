"""Command line and environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offramp.server import cli
from offramp.server.config import ServerConfig
from offramp.server.options import (
    OTHER_VARIABLES,
    Option,
    OptionError,
    build,
    from_environment,
    markdown,
    non_defaults,
    options,
    parse,
)


def test_no_arguments_give_the_defaults() -> None:
    assert parse([], {}) == ServerConfig()


def test_command_line_wins_over_environment() -> None:
    config = parse(["--port", "9"], {"OFFRAMP_PORT": "8", "OFFRAMP_MAX_NUM_SEQS": "3"})
    assert (config.port, config.engine.max_num_seqs) == (9, 3)


@pytest.mark.parametrize("flag", ["--max-num-seqs", "--max_num_seqs", "--max-num_seqs"])
def test_dashes_and_underscores_are_the_same(flag: str) -> None:
    assert parse([flag, "5"], {}).engine.max_num_seqs == 5
    assert parse([f"{flag}=5"], {}).engine.max_num_seqs == 5


def test_model_is_positional_and_flags_of_several_values_take_them() -> None:
    config = parse(["m", "--served-model-name", "a_b", "c", "--api-key", "k"], {})
    assert config.engine.model == "m"
    assert config.served_model_name == ("a_b", "c")
    assert config.api_key == ("k",)


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["--no-enable-prefix-caching"], {}, False),
        (["--enable-prefix-caching"], {"OFFRAMP_ENABLE_PREFIX_CACHING": "0"}, True),
        ([], {"OFFRAMP_ENABLE_PREFIX_CACHING": "off"}, False),
    ],
)
def test_switches(argv: list[str], environ: dict[str, str], expected: bool) -> None:  # noqa: FBT001
    assert parse(argv, environ).engine.enable_prefix_caching is expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "x"], "--port"),
        (["--port", "70000"], "--port"),
        (["--block-size", "0"], "--block-size"),
        (["--exit-threshold", "nan"], "--exit-threshold"),
        (["--dtype", "int4"], "--dtype"),
        (["--unknown"], "--unknown"),
        (["--max-num-seq", "1"], "--max-num-seq"),
        (["a", "b"], "b"),
    ],
)
def test_wrong_options_end_with_one_line_that_names_them(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(argv, {})
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"OFFRAMP_PROT": "1"},
        {"OFFRAMP_ENABLE_PREFIX_CACHING": "maybe"},
        {"OFFRAMP_LOG_LEVEL": "loud"},
    ],
)
def test_wrong_variables_are_errors(environ: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=next(iter(environ))):
        from_environment(environ)


def another_value(option: Option) -> str:
    """A value of an option that is not its default, as text."""
    if option.is_bool:
        return "off" if option.field.default else "on"
    words = [word for word in option.choices if word != option.field.default]
    if words:
        return words[-1]
    # Half a unit, one more, and a word: the first that the option takes and does not have.
    for text in ("0.5", "7", "word"):
        try:
            config = build({option.name: (text,) if option.is_list else text})
        except OptionError:
            continue
        if option.name in non_defaults(config):
            return text
    raise AssertionError(option.name)


@pytest.mark.parametrize("option", list(options()), ids=lambda option: option.name)
def test_every_variable_does_what_its_flag_does(option: Option) -> None:
    text = another_value(option)
    if option.name == "model":
        argv = [text]
    elif option.is_bool:
        argv = [option.flag if text == "on" else "--no-" + option.flag[2:]]
    else:
        argv = [option.flag, text]
    found = parse([], {option.variable: text})
    assert found == parse(argv, {})
    assert list(non_defaults(found)) == [option.name]


def test_variables_of_others_are_no_options() -> None:
    assert not {option.variable for option in options()} & set(OTHER_VARIABLES)


def test_the_page_of_options_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == markdown(), "run `make docs`"


def test_variables_of_others_are_left_alone() -> None:
    assert from_environment({"OFFRAMP_CACHE_DIR": "/x", "PATH": "/bin"}) == {}
    assert from_environment({"OFFRAMP_LOG_LEVEL": "debug"}) == {}


def test_help_names_every_option_with_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], {})
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in options():
        assert f"env: {option.variable}]" in text
        assert option.name == "model" or option.flag in text


def test_changed_options_are_shown_without_secrets() -> None:
    config = parse(["--api-key", "secret", "--port", "1"], {})
    assert non_defaults(config) == {"api_key": "***", "port": 1}


def test_help_of_the_command_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["nonsense"]) == 2


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"offramp {name}" in capsys.readouterr().out


def test_help_loads_neither_torch_nor_the_web_framework() -> None:
    code = (
        "import sys; from offramp.server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(1 if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
