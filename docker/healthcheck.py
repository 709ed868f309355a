"""Exit status 0 while the server accepts requests, 1 otherwise. Standard library only."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 5


def ready(port: int) -> bool:
    """Whether the server on this machine answers /ready with 200."""
    try:
        address = f"http://127.0.0.1:{port}/ready"
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(0 if ready(int(os.environ.get("OFFRAMP_PORT", "8000"))) else 1)
