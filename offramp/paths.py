"""Where downloaded and generated models are kept."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder(chosen: Path | None = None) -> Path:
    """``chosen``, else ``OFFRAMP_CACHE_DIR``, else the platform's cache folder of this user."""
    if chosen is not None:
        return chosen
    named = os.environ.get("OFFRAMP_CACHE_DIR")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("offramp"))
