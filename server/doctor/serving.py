"""What a server is given: its variables, its address and keys, and the cache of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from offramp.models.loading.sources import CARRIERS, TINY, is_whole
from offramp.models.shapes import holds_tiny
from offramp.paths import cache_folder
from offramp.server.config import GIB, ServerConfig
from offramp.server.doctor.findings import Finding, Level
from offramp.server.doctor.machine import disk_free, writable
from offramp.server.keys import ApiKeys, check_shares, is_loopback
from offramp.server.options import PREFIX, OptionError, build, from_environment
from offramp.server.serve import bind, bind_message, tls_fault


def environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[Finding]]:
    """The variables that `serve` would take, and a finding for each, also those it would refuse."""
    good: dict[str, str] = {}
    found: list[Finding] = []
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX):
            continue
        try:
            build(from_environment({name: text}))
        except OptionError as error:
            fault = str(error) if name in str(error) else f"{name}: {error}"
            advice = "unset it, or see `offramp serve --help` for what it may be"
            found.append(Finding("environment", fault, Level.ERROR, advice))
        else:
            good[name] = text
            found.append(Finding("environment", f"{name} is set"))
    return good, found or [Finding("environment", f"no {PREFIX} variables")]


def address(config: ServerConfig) -> Iterator[Finding]:
    """Whether the port is free, TLS can be spoken and keys can be read.

    Raises ApiKeyError where those cannot.
    """
    where = f"{config.host}:{config.port}"
    try:
        with bind(config.host, config.port) as listener:
            host = listener.getsockname()[0]
    except OSError as error:
        yield Finding("address", bind_message(config, error), Level.ERROR)
        host = config.host
    else:
        yield Finding("address", f"{where} is free")
    fault = tls_fault(config)
    if fault is not None:
        yield Finding("TLS", fault, Level.ERROR)
    elif config.ssl_certfile is not None:
        yield Finding("TLS", f"served with {config.ssl_certfile}")
    keys = ApiKeys(config.api_key, config.api_key_file)
    check_shares(keys, config.max_requests_per_key)
    if keys:
        yield Finding("keys", "clients must send one")
    elif is_loopback(host):
        yield Finding("keys", "none: whoever is on this machine may use the server")
    else:
        text = f"none: whoever reaches {where} may use the server"
        yield Finding("keys", text, Level.WARNING, "set --api-key or --api-key-file")


def cache() -> Iterator[Finding]:
    """The folder of models and compiled kernels, and what is in it."""
    folder = cache_folder()
    if writable(folder):
        yield Finding("cache", f"{folder}, {disk_free(folder) / GIB:.1f} GiB free")
    else:
        advice = "it serves what it holds; to fetch or compile, set OFFRAMP_CACHE_DIR to another"
        yield Finding("cache", f"{folder} cannot be written", Level.WARNING, advice)
    for path in (folder / "models" / name for name in (*CARRIERS, TINY)):
        if not path.exists():
            continue
        whole = holds_tiny(path) if path.name == TINY else is_whole(path)
        if whole:
            yield Finding("cached model", path.name)
        else:
            advice = "it is made again at the next start, where the cache can be written"
            yield Finding("cached model", f"{path.name} is not whole", Level.WARNING, advice)
