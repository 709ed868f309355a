"""llama.cpp's own server, run as ``python -m offramp.server.bench.peer_llamacpp``."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence

from offramp.server.bench.process import follow_parent

# Warnings and errors; a line for every request would cost time.
_WARNINGS = 2


def main(argv: Sequence[str]) -> None:
    """Serve until the parent ends; the address is printed once the model is loaded."""
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", help="model file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="answers at once")
    parser.add_argument("--context", type=int, required=True, help="tokens of a slot")
    args = parser.parse_args(argv)
    follow_parent()
    import xllamacpp  # noqa: PLC0415

    params = xllamacpp.CommonParams()
    params.model.path = args.gguf
    params.port = 0
    params.n_parallel = args.slots
    params.n_ctx = args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.warmup = True
    params.verbosity = _WARNINGS
    # No copies of slots beside the K,V, and no shrinking of what was asked for.
    params.cache_ram_mib = 0
    params.fit_params = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"ready on {server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
