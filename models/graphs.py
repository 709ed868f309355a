"""Launches recorded once and replayed: CUDA graphs, and plain calls where there are none."""

from __future__ import annotations

from collections.abc import Callable

import torch

Launches = Callable[[], None]


class Recorder:
    """Records sequences of launches on ``device``; all share one pool of memory.

    What is recorded reads and writes memory that stays where it is, and asks the device nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

    def record(self, launches: Launches) -> Launches:
        """What replays ``launches``. They run once first, which compiles their kernels."""
        if not self._on_gpu:
            return launches
        # Off the default stream, as torch asks of what will be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launches()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launches()
        return graph.replay
