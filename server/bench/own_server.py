"""``offramp serve`` that ends with the benchmark that started it."""

from __future__ import annotations

import sys

from offramp.server import cli
from offramp.server.bench.process import follow_parent

if __name__ == "__main__":
    follow_parent()
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
