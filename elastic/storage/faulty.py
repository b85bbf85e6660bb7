"""A storage that is slow, full or flaky on demand: what `solvent chaos` injects below everything that should cope.

A process whose environment names a control file in ``SOLVENT_STORAGE_FAULTS`` looks at it before each operation:

    {"slow": {"rate": 2.0, "until_s": 1764000000, "seed": 1}}

`slow` lets `rate` MiB/s pass and adds 50 ms to each operation; `full` refuses what would take space (ENOSPC);
`flaky` fails a share `rate` of all operations (EIO), half of the writes among them after they were done, as when an
answer is lost. All of them may hold at once. `until_s` is a Unix time; without it the fault lasts as long as the file.
No file, no fault.
"""

import errno
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from elastic.storage import Storage

_T = TypeVar("_T")

FAULTS_VARIABLE = "SOLVENT_STORAGE_FAULTS"

Kind = Literal["slow", "full", "flaky"]

_SLOW_OPERATION_S = 0.05
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a control file asks for."""

    kind: Kind
    rate: float = 1.0
    until_s: float = float("inf")
    seed: int = 0


def write_fault(control: Path, fault: Fault) -> None:
    """Let the processes that look at `control` suffer from `fault`, too; remove the file to end all."""
    content = {**_read(control), fault.kind: {"rate": fault.rate, "until_s": fault.until_s, "seed": fault.seed}}
    temporary = control.with_name(f".{control.name}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.rename(control)


def read_faults(control: Path, *, now_s: float) -> dict[Kind, Fault]:
    """Return the faults that a control file asks for now."""
    faults = [Fault(kind=kind, **fields) for kind, fields in _read(control).items()]
    return {fault.kind: fault for fault in faults if now_s < fault.until_s}


def _read(control: Path) -> dict[Kind, dict[str, Any]]:
    try:
        return json.loads(control.read_text())
    except FileNotFoundError:
        return {}


class FaultyStorage:
    """See `elastic.storage.Storage`; passes operations on to a real one, or does not."""

    def __init__(
        self,
        storage: "Storage",
        control: Path,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage
        self._control = control
        self._sleep = sleep
        self._now_s = now_s
        self._random: random.Random | None = None

    @property
    def url(self) -> str:
        """Return the inner storage's."""
        return self._storage.url

    def write(self, key: str, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
        """Suffer before, between and after the chunks."""
        return self._change(key, lambda: self._storage.write(key, self._slow_down(chunks)))

    def put_new(self, key: str, data: bytes) -> bool:
        """Suffer before or after."""
        return self._change(key, lambda: self._storage.put_new(key, data))

    def read(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Suffer before and after."""
        self._suffer(key)
        data = self._storage.read(key, start=start, size=size)
        self._pass(len(data))
        return data

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        """Suffer before and after."""
        self._suffer(key)
        self._storage.read_into(key, start, out)
        self._pass(out.nbytes)

    def get_size(self, key: str) -> int | None:
        """Suffer before."""
        self._suffer(key)
        return self._storage.get_size(key)

    def list(self, prefix: str = "") -> list[str]:
        """Suffer before."""
        self._suffer(prefix)
        return self._storage.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        """Suffer before."""
        wanted = list(keys)
        self._suffer(wanted[0] if wanted else "")
        self._storage.delete(wanted)

    def sweep(self, prefix: str) -> None:
        """Suffer before."""
        self._suffer(prefix)
        self._storage.sweep(prefix)

    def get_free_bytes(self) -> int | None:
        """Tell what the inner storage tells."""
        return self._storage.get_free_bytes()

    def _get_faults(self) -> dict[Kind, Fault]:
        return read_faults(self._control, now_s=self._now_s())

    def _strike(self, fault: Fault) -> bool:
        if self._random is None:
            self._random = random.Random(fault.seed)
        return self._random.random() < fault.rate

    def _suffer(self, key: str) -> None:
        faults = self._get_faults()
        if "slow" in faults:
            self._sleep(_SLOW_OPERATION_S)
        if "flaky" in faults and self._strike(faults["flaky"]):
            raise self._fail(key)

    def _change(self, key: str, action: Callable[[], _T]) -> _T:
        faults = self._get_faults()
        if "full" in faults:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{self.url}/{key}")
        if "flaky" in faults and self._strike(faults["flaky"]):
            assert self._random is not None
            if self._random.random() < 1 / 2:
                action()
            raise self._fail(key)
        if "slow" in faults:
            self._sleep(_SLOW_OPERATION_S)
        return action()

    def _slow_down(self, chunks: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
        for chunk in chunks:
            self._pass(memoryview(chunk).nbytes)
            yield chunk

    def _pass(self, num_bytes: int) -> None:
        if slow := self._get_faults().get("slow"):
            self._sleep(num_bytes / _MIB / slow.rate)

    def _fail(self, key: str) -> OSError:
        return OSError(errno.EIO, "failed on demand", f"{self.url}/{key}")
