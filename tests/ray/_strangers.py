"""Strangers at a door of a running cluster: all that they could think of, bounded, on this machine only."""

import contextlib
import socket
import time
from pathlib import Path

from elastic.transport.handshake import Handshake

MIB = 1 << 20
WAIT_S = 1.0
HTTP = b"GET / HTTP/1.0\r\n\r\n"
TLS = bytes.fromhex("16030102000100 01fc0303") + bytes(506)


def find_ports(pid):
    """Return where a process listens, over TCP."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(entry.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                host, port = fields[1].split(":")
                ip = socket.inet_ntoa(bytes.fromhex(host[-8:])[::-1])  # the last part of one that is mapped to IPv6
                found.append(("127.0.0.1" if ip == "0.0.0.0" else ip, int(port, 16)))
    return found


def knock(address):
    """Return a connection, or None if there is no room for one."""
    connection = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    connection.settimeout(WAIT_S)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection


def say(address, data):
    """Connect, say something and hear the answer out; return it."""
    answer = b""
    if connection := knock(address):
        with connection, contextlib.suppress(OSError):
            connection.sendall(data)
            connection.settimeout(0.05)
            while more := connection.recv(4096):
                answer += more
    return answer


def pour(address):
    """Send a hundred megabytes without an end, as long as they are taken."""
    if connection := knock(address):
        with connection, contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"a" * MIB)


def stand_about(address):
    """Be two thousand at once that say nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(2000):
            connection = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
            stack.enter_context(connection)
            connection.setblocking(False)
            connection.connect_ex(address)
        time.sleep(2)


def harass(address):
    """Do all that a stranger could think of at one door, if it opens."""
    if not (connection := knock(address)):
        return
    connection.close()
    for data in (HTTP, TLS, b"[1]\n", b'{"kind":"End","reason":"over","forget":true}\n', b"\0\0\0\x0f{"):
        say(address, data)
    pour(address)
    for purpose in ("coordinator", "replicas"):
        caller = Handshake("guessed", role="caller", purpose=purpose)
        hello = caller.start()
        answer = say(address, hello)
        for proof in (bytes(32), answer[-32:]):  # a guess, and its own proof back
            say(address, hello + proof)
        for cut in range(len(hello)):
            if connection := knock(address):
                with connection, contextlib.suppress(OSError):
                    connection.sendall(hello[:cut])
    stand_about(address)


def get_rss_mib(pid):
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024
