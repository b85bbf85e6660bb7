"""The log of a RayJob: what the pods that submit it print, attempt by attempt, each line once."""

import threading
import time
from collections.abc import Callable, Sequence

from cluster.kube.api.refusals import ForbiddenError, ServerLostError
from cluster.kube.api.server import LOG_SILENT_S, ApiServer
from cluster.log_lines import Colors, LogLines
from elastic.errors import ClusterError

_RETRY_S = 2.0
_LAST_LINES_S = 30.0
"""So long the last lines of a job that has ended are asked for, if the server does not answer."""


class JobLog:
    """Reads beside the watch, in a thread of its own, until `stop`.

    A stream whose connection has died says nothing, as a job does that has nothing to say; so each that is silent for a
    while is opened again, from its last line on.
    """

    def __init__(
        self,
        server: ApiServer,
        name: str,
        *,
        show: Callable[[str], None],
        say: Callable[[str], None],
        colors: Colors = "strip",
    ) -> None:
        self._server = server
        self._name = name
        self._show = show
        self._say = say
        self._lines = LogLines(colors=colors)
        self._stopping = threading.Event()
        self._is_forbidden = False
        self._seen: dict[str, tuple[str, int]] = {}
        """Pod -> time of the last line that was shown, and how many lines of that very time were."""
        self._complete: set[str] = set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read, unless that has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Show what is left, and end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(LOG_SILENT_S + 10 * _RETRY_S)
        deadline_s = time.monotonic() + _LAST_LINES_S
        while not self._read_all(is_last=True) and time.monotonic() < deadline_s:
            time.sleep(_RETRY_S)

    def _run(self) -> None:
        while not self._stopping.is_set() and not self._is_forbidden:
            self._read_all(is_last=False)
            self._stopping.wait(_RETRY_S)

    def _read_all(self, *, is_last: bool) -> bool:
        """Read each pod's log to its end, or as far as it goes now; return whether the server answered."""
        if self._is_forbidden:
            return True
        try:
            pods = [pod["metadata"]["name"] for pod in self._server.list_pods(f"job-name={self._name}")]
            for pod in pods:
                if pod not in self._complete:
                    self._read(pod, is_last=is_last)
        except ServerLostError:
            return False
        except ForbiddenError as error:
            self._is_forbidden = True
            self._say(f"{self._name}: its log is not shown: {error}")
        except ClusterError:
            pass  # the pod is not ready or gone; the watch says what matters
        return True

    def _read(self, pod: str, *, is_last: bool) -> None:
        is_over = is_last or _is_over(self._server, pod)
        since, num_shown = self._seen.get(pod, ("", 0))
        num_again = 0
        try:
            for at, line in self._server.stream_log(pod, since=since, follow=not is_over):
                num_again += at == since
                if at < since or (at == since and num_again <= num_shown):
                    continue  # the server goes by whole seconds
                last, num = self._seen.get(pod, ("", 0))
                self._seen[pod] = (at, num + 1 if at == last else 1)
                self._show_all(self._lines.take(line))
                if self._stopping.is_set() and not is_last:
                    return
        finally:
            self._show_all(self._lines.flush())
        if is_over:
            self._complete.add(pod)

    def _show_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._show(line)


def _is_over(server: ApiServer, pod: str) -> bool:
    """Whether a pod has ended, so that its log is complete."""
    found = server.get("Pod", pod)
    return found is None or found.get("status", {}).get("phase") in ("Succeeded", "Failed")
