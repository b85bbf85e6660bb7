"""An HTTP proxy in front of the S3 server that throttles, fails, dawdles and hangs up on a share of the requests."""

import http.client
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FATES = ("throttled", "answer lost", "hung up", "slow")
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "date", "server"}


@contextmanager
def open_proxy(target, *, rate=0.0, rates=None, seed=0, heard=None, slow_s=0.5, held=lambda path: False):
    """Yield ``(url, counter of what was done to requests)``; a share `rate` of them suffers one of four fates.

    Args:
        rates: the share of requests that each of some fates strikes, instead of `rate`.
        heard: a list that takes each request's method and path.
        held: whether requests to a path must wait; asked again until it says no.
    """
    rates = rates or dict.fromkeys(FATES, rate / len(FATES))
    address, dice, lock = urlsplit(target).netloc, random.Random(seed), threading.Lock()
    done = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                (fate,) = dice.choices([*rates, "served"], [*rates.values(), 1 - sum(rates.values())])
                done[fate] += 1
                if heard is not None:
                    heard.append(f"{self.command} {self.path}")
            while held(self.path):
                time.sleep(0.01)
            if fate == "throttled":
                return self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
            if fate == "hung up":
                return self._hang_up()
            if fate == "slow":
                time.sleep(slow_s)
            connection = http.client.HTTPConnection(address)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if fate == "answer lost":
                return self._hang_up()
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS]
            return self._answer(answer.status, headers, data, length)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 (the base class's names)

        def _answer(self, status, headers, data, length=None):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _hang_up(self):
            self.close_connection = True
            self.connection.close()

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):  # a client that was killed, or a hang-up of ours
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", done
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
