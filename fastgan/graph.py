"""Work that is recorded once and replayed: CUDA graphs that share one memory pool and one stream."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Recorder:
    """Records pieces of work on a GPU; what they read and write later lies where it lay when recorded.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work on the stream of the recording, so that libraries, autotuning and allocations are done
        with."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as something to replay; nothing is computed now.

        Raises:
            RuntimeError: work that waits for the device, copies from pageable memory or allocates outside of
                torch's allocator.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay
