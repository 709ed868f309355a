"""Fixtures for all tests."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch: threads of a busy machine wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before kernels are defined: without a GPU they are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from blockbuster import blockbuster_ctx

from offramp.models.loading.sources import resolve
from offramp.models.shapes import write_tiny

# `make sanitize-threads` wants more than one thread everywhere.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
SEED = 0


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed set for every source of chance before each test."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 (libraries under test draw from the global one)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """In async tests, a call of ours that blocks the event loop is an error."""
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield
        return
    with blockbuster_ctx("offramp"):
        yield


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of the embedded model; pulled when it is not in the cache."""
    return resolve("smollm2-135m")
