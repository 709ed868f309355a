"""``python -m offramp``: the command, also where it is not installed."""

from __future__ import annotations

import sys

from offramp.server.cli import main

sys.exit(main())
