"""Client libraries and third-party judges against a live server.

``python -m tests.clients.run`` installs what it needs into .venv-clients, starts ``offramp serve``
once, runs every part, prints a table and writes docs/conformance.md. The exit status is 1 where a
part that applies fails or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from offramp.models.loading.sources import resolve
from offramp.server.bench.process import SERVE_OFFRAMP, serving
from offramp.server.bench.systems import gguf
from tests.clients.environments import FOLDER, NotInstalled, install, python, version
from tests.clients.report import Outcome, PartResult, page, table
from tests.clients.suites import PARTS, Part

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance.md"
MODEL = "smollm2-135m"
OFFRAMP = "offramp"
# Judges send requests without a model, which OpenAI refuses, and sampled ones without a bound:
# their answers must end before the judges lose patience.
_OPTIONS = ("--port", "0", "--require-model", "--max-model-len", "2048")
LLAMACPP = "llamacpp"


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line names; returns the exit status."""
    args = _arguments(words)
    parts = [part for part in PARTS if not args.only or part.name.split()[0] in args.only]
    if not parts:
        names = ", ".join(dict.fromkeys(part.name.split()[0] for part in PARTS))
        _log(f"no part has such a name; there are {names}")
        return 2
    folders = _environments(parts)
    results: dict[str, list[PartResult]] = {}
    for system in filter(None, (OFFRAMP, args.peer)):
        with _server(system, args.url) as url:
            results[system] = [
                _run(part, folders[part.environment], url, system)
                for part in parts
                if system == OFFRAMP or part.against_peers
            ]
    print(table(results))
    if args.json:
        document = {name: [part.document() for part in found] for name, found in results.items()}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not args.only:
        PAGE.write_text(page(results), encoding="utf-8")
    return 0 if all(result.good() for result in results[OFFRAMP]) else 1


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.clients.run", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="parts by the first word of their name"
    )
    parser.add_argument("--peer", choices=[LLAMACPP], help="run the parts against a peer as well")
    parser.add_argument("--url", help="an Offramp that runs already, without /v1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    return parser.parse_args(words)


def _environments(parts: Sequence[Part]) -> dict[str, Path | NotInstalled]:
    """The folder of each environment, or why it is not there."""
    found: dict[str, Path | NotInstalled] = {}
    for name in dict.fromkeys(part.environment for part in parts):
        begun = time.monotonic()
        try:
            found[name] = install(name)
        except NotInstalled as fault:
            found[name] = fault
        if time.monotonic() - begun > 1:
            _log(f"{name}: {'not ' * isinstance(found[name], NotInstalled)}installed")
    return found


@contextmanager
def _server(system: str, url: str | None) -> Iterator[str]:
    """The address of a server of the embedded model, started unless it is at ``url``."""
    if system == OFFRAMP and url:
        yield url.rstrip("/")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    module, *words = (
        (*SERVE_OFFRAMP, MODEL, *_OPTIONS)
        if system == OFFRAMP
        else ("tests.clients.llamacpp", str(gguf(MODEL)), MODEL)
    )
    with serving(module, *words) as process:
        yield process.address()


def _run(part: Part, folder: Path | NotInstalled, url: str, system: str) -> PartResult:
    """Run one part against the server at ``url``."""
    if isinstance(folder, NotInstalled):
        return PartResult(part, "", [], f"{part.package} is not installed: {folder}")
    work = FOLDER / "work" / system / part.name.replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    results = work / "results.jsonl"
    environ = {
        **os.environ,
        **part.settings,
        "BASE_URL": f"{url}/v1",
        "MODEL": MODEL,
        "WORK": str(work),
        "TOOLS": str(folder),
        "RESULTS": str(results),
        "MODEL_FOLDER": str(resolve(MODEL)),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    begun = time.monotonic()
    reason = _execute(_command(part, folder), environ, work, part.timeout_s)
    seconds = time.monotonic() - begun
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    if not outcomes and not reason:
        reason = "it reported nothing"
    result = PartResult(part, version(folder, part.package), outcomes, reason, seconds)
    _log(f"{system}, {part.name}: {result.score()} in {seconds:.0f} s")
    return result


def _command(part: Part, folder: Path) -> list[str]:
    """The words that run a script; one in JavaScript is copied to where its packages are."""
    scripts = Path(__file__).with_name("parts")
    if part.script.endswith(".mjs"):
        for name in ("checks.mjs", part.script):
            shutil.copy(scripts / name, folder / name)
        return [shutil.which("node") or "node", str(folder / part.script)]
    return [python(folder), "-m", f"tests.clients.parts.{part.script.removesuffix('.py')}"]


def _execute(words: list[str], environ: dict[str, str], work: Path, timeout_s: float) -> str:
    """Run a script, its output in work/log.txt; returns why it did not end well."""
    with (work / "log.txt").open("w", encoding="utf-8") as log:
        # A session of its own: what a script started ends with it.
        process = subprocess.Popen(
            words, env=environ, cwd=work, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"it was not done within {timeout_s:.0f} s"
        finally:
            _end(process)
    if not status:
        return ""
    last = (work / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
    return f"it ended with status {status}: {''.join(last)[:300]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a script and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
