"""A TCP proxy that a test can cut (open connections break, new ones are refused until it is mended) or make slow."""

import contextlib
import select
import socket
import threading
import time


class TcpProxy:
    """Passes bytes between its own port on the loop-back interface and a target's.

    Args:
        delay_s: it waits for so long before it passes on what it has received, at most 64 KiB.
    """

    def __init__(self, target_port: int, *, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self._target = ("127.0.0.1", target_port)
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start()

    def cut(self) -> int:
        """Break what is open and refuse what is new; return how many connections broke."""
        self._stop()
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        return len(pairs)

    def mend(self) -> None:
        """Take connections again, at the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._start()

    def close(self) -> None:
        self.cut()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self.num_connections += 1
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs.add((near, far))
            threading.Thread(target=self._pass, args=(near, far), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            try:
                while True:
                    for end in select.select([near, far], [], [])[0]:
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        time.sleep(self._delay_s)
                        (far if end is near else near).sendall(data)
            except OSError:
                return
            finally:
                with self._lock:
                    self._pairs.discard((near, far))
