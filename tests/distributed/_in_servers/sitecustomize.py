"""Python runs this in replica servers that start with this folder on their path: they die at the operation that was
chosen."""

import mmap
import os
import socket

from zlib_ng import zlib_ng

from tests.distributed._crash_points import count_operations

if log := os.environ.get("CRASH_LOG"):
    descriptor, write, fatal = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), os.write, os.environ["CRASH_AT"]
    count_operations(
        [
            *((socket.socket, name) for name in ("sendall", "sendmsg", "recv", "recv_into", "recvmsg_into")),
            *((socket.socket, name) for name in ("accept", "connect")),
            *((os, name) for name in ("memfd_create", "ftruncate", "close")),
            (mmap, "mmap"),
            (zlib_ng, "crc32"),
        ],
        int(fatal) if fatal else None,
        lambda name: write(descriptor, f"{name}\n".encode()),
    )
