"""What RAY_ADDRESS may say, and what is found out about who is there; against real sockets of this machine."""

import http.server
import socket
import threading
import time

import pytest

from cluster.runtime.ray.head_address import Head, check_head, parse_address, probe
from elastic.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", "local"),
        ("local", "local"),
        ("auto", "auto"),
        ("10.0.0.5:6379", Head(host="10.0.0.5", port=6379)),
        ("head.svc.cluster.local:6379", Head(host="head.svc.cluster.local", port=6379)),
        ("[fd00::5]:6379", Head(host="fd00::5", port=6379)),
    ],
)
def test_an_address_means_what_ray_means_by_it(text, meaning):
    assert parse_address(text) == meaning


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("http://127.0.0.1:8265", "solvent submit --to ray --address http://127.0.0.1:8265"),
        ("https://x", "is a dashboard's address"),
        ("ray://10.0.0.5:10001", "ray:// is for clients outside"),
        ("10.0.0.5", "is no address. Set HOST:PORT"),
        ("10.0.0.5:99999", "is no address"),
        ("10.0.0.5:6379/x", "is no address"),
        (":6379", "is no address"),
    ],
)
def test_what_is_no_head_s_address_is_refused_with_what_to_type(text, part):
    with pytest.raises(ConfigError) as refused:
        parse_address(text)
    assert part in str(refused.value) and text in str(refused.value)


class Peer:
    """Somebody at a port of this machine who says something to each caller, and goes on listening."""

    def __init__(self, says):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.head = Head(host="127.0.0.1", port=self._listener.getsockname()[1])
        self._says, self._links = says, []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self._links.append(link)
            if self._says is None:
                link.close()
            else:
                link.sendall(self._says)

    def close(self):
        self._listener.close()
        for link in self._links:
            link.close()


@pytest.mark.parametrize(
    ("says", "answer"),
    [
        (bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + bytes(6), "head"),  # settings, as gRPC begins
        (b"SSH-2.0-OpenSSH_9.2\r\n", "other"),
        (b"HTTP/1.1 400 Bad Request\r\n", "other"),
        (None, "other"),
        (b"", "silent"),
        (bytes(4), "silent"),
    ],
)
def test_who_answers_is_told_by_the_first_bytes_and_within_the_limit(says, answer):
    peer, start_s = Peer(says), time.monotonic()
    assert probe(peer.head, limit_s=0.4) == answer
    assert time.monotonic() - start_s < 2
    peer.close()


def test_a_closed_port_is_tried_until_the_limit_because_a_head_may_be_starting():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        head = Head(host="127.0.0.1", port=listener.getsockname()[1])
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS={head}: nobody listens there"):
        check_head(head, {}, limit_s=0.3)


def test_a_dashboard_s_port_is_told_from_a_head_s():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(ConfigError, match="no Ray head: a dashboard's port is not the head's, which is 6379"):
        check_head(Head(host="127.0.0.1", port=server.server_port), {}, limit_s=2)
    server.shutdown()
    server.server_close()


def test_an_unknown_host_is_named():
    with pytest.raises(ConfigError, match=r"there is no host nowhere\.invalid"):
        check_head(Head(host="nowhere.invalid", port=6379), {}, limit_s=5)
