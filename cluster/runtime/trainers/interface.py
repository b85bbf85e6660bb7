"""Which network interface has an address."""

import fcntl
import socket
import struct
from contextlib import suppress

_SIOCGIFADDR = 0x8915
_NAME_BYTES = 16
"""Source: linux/sockios.h and linux/if.h (IFNAMSIZ); netdevice(7) describes the call."""


def find_interface(ip: str) -> str:
    """Return the name of the interface whose first IPv4 address this is; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[: _NAME_BYTES - 1])
            with suppress(OSError):  # it has no address
                # the name, then a sockaddr_in: family, port, address
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[_NAME_BYTES + 4 : _NAME_BYTES + 8]) == ip:
                    return name
    return ""
