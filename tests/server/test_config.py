"""Command line and environment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from offramp.server import cli
from offramp.server.config import ServerConfig
from offramp.server.options import OptionError, from_environment, non_defaults, options, parse


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
    "environ", [{"OFFRAMP_PROT": "1"}, {"OFFRAMP_ENABLE_PREFIX_CACHING": "maybe"}]
)
def test_wrong_variables_are_errors(environ: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=next(iter(environ))):
        from_environment(environ)


def test_variables_of_others_are_left_alone() -> None:
    assert from_environment({"OFFRAMP_CACHE_DIR": "/x", "PATH": "/bin"}) == {}


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
