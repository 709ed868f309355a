"""A server that speaks llama.cpp's completions, run where the bench would run the real one.

Its model file is JSON: ``fail`` makes every answer an error. Ids of every third token are kept out
of the stream, as the real server does with tokens that end inside a character.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from offramp.server.bench.process import follow_parent


def answer(count: int) -> list[int]:
    """The ids this server answers anything with."""
    return [10 + i for i in range(count)]


class Handler(BaseHTTPRequestHandler):
    fail = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/completion"
        assert all(isinstance(token, int) for token in body["prompt"])
        ids = answer(body["n_predict"])
        self.send_response(200)
        self.end_headers()
        if not body["stream"]:
            self.wfile.write(json.dumps({"tokens": ids}).encode())
            return
        if self.fail:
            self._event({"error": {"message": "out of memory"}})
            return
        for count, token in enumerate(ids, start=1):
            if count % 3:
                self._event({"tokens": [token], "tokens_predicted": count})
        self._event({"tokens": [], "tokens_predicted": len(ids)})

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        pass


if __name__ == "__main__":
    follow_parent()
    Handler.fail = bool(json.loads(Path(sys.argv[1]).read_text())["fail"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"ready on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
