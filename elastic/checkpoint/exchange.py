"""Plain data and errors from rank to rank, as JSON in tensors: torch's own way to send objects unpickles them."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from elastic import errors
from elastic.breaker import connecting_group
from elastic.errors import SolventError
from elastic.transport import build_parser, to_plain

_T = TypeVar("_T")

Group = dist.ProcessGroup | None


def new_group(timeout: timedelta) -> dist.ProcessGroup:
    """Return a gloo group of all ranks."""
    with connecting_group() as close_doors:
        group = dist.new_group(backend="gloo", timeout=timeout)
        close_doors()
    assert isinstance(group, dist.ProcessGroup), "every rank of the world is in it"
    return group


class Parcels(Generic[_T]):
    """Carries values of one type between the ranks of a group, or the error that one met instead of a value.

    Args:
        hint: the type, of what `elastic.transport.Vocabulary` knows.
    """

    def __init__(self, hint: Any) -> None:
        self._parse = build_parser(hint)

    def broadcast(self, value: _T | Exception | None, group: Group) -> _T | Exception:
        """Return rank 0's value on all ranks; the others' is not looked at."""
        is_sender = dist.get_rank(group) == 0
        if dist.get_world_size(group) == 1:  # NCCL would set up a communicator for this alone
            return value  # pyright: ignore[reportReturnType] # of rank 0, which has one
        data = self._pack(value, group) if is_sender else None
        size = torch.tensor([0 if data is None else len(data)], device=_get_device(group))
        dist.broadcast(size, group_src=0, group=group)
        if data is None:
            data = torch.empty(int(size), dtype=torch.uint8, device=size.device)
        dist.broadcast(data, group_src=0, group=group)
        return value if is_sender else self._unpack(data)  # pyright: ignore[reportReturnType] # rank 0 has one

    def all_gather(self, value: _T | Exception, group: Group) -> list[_T | Exception]:
        """Return the values of all ranks, on all of them."""
        if dist.get_world_size(group) == 1:
            return [value]
        data, sizes = self._pad(value, group)
        parts = [torch.empty_like(data) for _ in sizes]
        dist.all_gather(parts, data, group=group)
        return self._unpack_all(parts, sizes)

    def gather(self, value: _T | Exception, group: Group) -> list[_T | Exception]:
        """Return the values of all ranks on rank 0, and none on the others."""
        if dist.get_world_size(group) == 1:
            return [value]
        data, sizes = self._pad(value, group)
        parts = [torch.empty_like(data) for _ in sizes] if dist.get_rank(group) == 0 else None
        dist.gather(data, parts, group_dst=0, group=group)
        return self._unpack_all(parts or [], sizes)

    def _pad(self, value: _T | Exception, group: Group) -> tuple[torch.Tensor, Sequence[int]]:
        """Return this rank's bytes, as many as the most that any rank has, and how many each has."""
        data = self._pack(value, group)
        own = torch.tensor([len(data)], device=data.device)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, own, group=group)
        counts = [int(size) for size in sizes]
        return torch.nn.functional.pad(data, (0, max(counts) - len(data))), counts

    def _pack(self, value: object, group: Group) -> torch.Tensor:
        plain = {"error": _describe(value)} if isinstance(value, Exception) else {"value": value}
        data = bytearray(json.dumps(plain, default=to_plain, separators=(",", ":")).encode())
        return torch.frombuffer(data, dtype=torch.uint8).to(_get_device(group))

    def _unpack_all(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[_T | Exception]:
        return [self._unpack(part[:size]) for part, size in zip(parts, sizes, strict=False)]

    def _unpack(self, data: torch.Tensor) -> _T | Exception:
        plain = json.loads(data.cpu().numpy().tobytes())
        return _revive(plain["error"]) if "error" in plain else self._parse(plain["value"])


def gather_values(parcels: Parcels[_T], value: _T, group: Group) -> list[_T]:
    """Return the values of all ranks, on all of them.

    Raises:
        Exception: the first that a rank has sent instead.
    """
    values: list[_T] = []
    for each in parcels.all_gather(value, group):
        if isinstance(each, Exception):
            raise each
        values.append(each)
    return values


def can_send(device: torch.device, group: Group) -> bool:
    """Tell whether tensors on devices like this one go straight from rank to rank."""
    return dist.get_world_size(group) > 1 and (device.type == "cpu" or "cuda:nccl" in dist.get_backend_config(group))


def _describe(error: Exception) -> dict[str, object]:
    if isinstance(error, OSError):
        return {"errno": error.errno, "text": error.strerror or str(error), "filename": str(error.filename or "")}
    return {"class": type(error).__name__, "text": str(error)}


def _revive(fields: dict[str, Any]) -> Exception:
    """Return an error as its rank has met it: a storage's, or one of our own classes."""
    if "errno" in fields:
        return OSError(fields["errno"], fields["text"], fields["filename"] or None)
    kind = getattr(errors, fields["class"], None)
    if isinstance(kind, type) and issubclass(kind, SolventError):
        return kind(fields["text"])
    return SolventError(f"{fields['class']}: {fields['text']}")


def _get_device(group: Group) -> torch.device:
    """Return where the group takes tensors, the host if it can."""
    on_host = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
