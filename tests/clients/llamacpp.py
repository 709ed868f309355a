"""llama.cpp's server as a peer: ``python -m tests.clients.llamacpp GGUF NAME``.

Unlike the benches' it has a name for its model, and applies the template of the file.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import xllamacpp

from offramp.server.bench.process import follow_parent


def main() -> None:
    """Serve the file until standard input closes."""
    follow_parent()
    gguf, name = sys.argv[1:]
    params: Any = xllamacpp.CommonParams()
    params.model.path = gguf
    params.model_alias = {name}
    params.port = 0
    params.n_parallel = 4
    params.n_ctx = 4 * 8192
    # It would go on for ever where a request has no limit and the model no end.
    params.n_predict = 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.use_jinja = True
    params.fit_params = False
    params.verbosity = 2
    server = xllamacpp.Server(params)
    sys.stdout.write(f"ready on {server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
