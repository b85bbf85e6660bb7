"""One HTTP request to a metadata server: bounded in time and size, straight to it, never redirected."""

import http.client
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from cluster.providers._base import Response

_MOST_BYTES = 1 << 20


def fetch(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    timeout_s: float = 2.0,
    ca_file: str = "",
) -> Response:
    """Return the answer to one request; see `Fetch`.

    Not urllib: it would go through the proxy of the environment and follow a redirect to a login page.

    Raises:
        OSError: nobody listens, no whole answer came in time, or it was no HTTP.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca_file or None)
        connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    deadline_s = time.monotonic() + timeout_s
    try:
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        connection.request(method, target, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return Response(
            status=answer.status,
            headers={name.lower(): value for name, value in answer.getheaders()},
            body=_read(answer, deadline_s),
            received_s=time.time(),
        )
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url} did not answer in HTTP: {error!r}") from error
    finally:
        connection.close()


def _read(answer: http.client.HTTPResponse, deadline_s: float) -> bytes:
    """Read the body; the connection's time-out bounds each piece, the deadline all of them."""
    pieces: list[bytes] = []
    size = 0
    while piece := answer.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > deadline_s:
            raise TimeoutError("the answer came too slowly")
        if size > _MOST_BYTES:
            raise ConnectionError(f"the answer is longer than {_MOST_BYTES} bytes")
    return b"".join(pieces)
