"""Copy the live state to host memory while the next forward and backward run."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.checkpoint.state import get_local


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A copy that is under way (CUDA) or done (CPU); `live` keeps its sources alive."""

    live: Mapping[str, Tensor]
    host: Mapping[str, Tensor]
    copied: torch.Event | None

    def wait_on_device(self) -> None:
        """Let the device change the live state only after the copy; the calling thread does not wait."""
        if self.copied is not None:
            self.copied.wait()

    def wait_on_host(self) -> None:
        """Return when `host` may be read."""
        if self.copied is not None:
            self.copied.synchronize()


class Stager:
    """Host buffers that all saves share, so at most one copy may be in use.

    On CUDA they are page-locked and filled on a stream of their own; the first call pays for the page-locking.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def stage(self, live: Mapping[str, Tensor]) -> Staged:
        """Start to copy this rank's part of each tensor."""
        if self._stream is None:
            return Staged(live=live, host=self._copy(live), copied=None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            host = self._copy(live)
        return Staged(live=live, host=host, copied=self._stream.record_event())

    @torch.no_grad()
    def _copy(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        host: dict[str, Tensor] = {}
        for name, tensor in live.items():
            local = get_local(tensor)
            if name not in self._buffers:
                self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=self._stream is not None)
            host[name] = self._buffers[name].copy_(local, non_blocking=True)
        return host
