"""How the processes of a run talk: who may connect, and what a message is. No torch here.

    hello      over TCP both sides prove that they know the run's secret before anything else is read (`handshake`)
    frame      4 bytes length | 16 bytes seal, over TCP | JSON object with a "kind" | raw bytes, between replica servers

The secret never crosses the wire, and a greeting is of no use to anyone but the two that made it. A seal is the
HMAC-SHA256 of a frame and its number under a key of this connection and direction: whoever relays a greeting can
neither change nor add, drop or repeat a message. Raw bytes have no seal (their CRC-32 stands in the message before
them), and nothing is encrypted.

Over a Unix socket the kernel says who is at the other end: another user is refused, nobody else can connect. A pair of
sockets that a process was born with needs neither.

What breaks these rules ends its own connection and nothing else, with a `WireError`; so does a message that could not
be sent in full. Between greeting and end no peer can make this process keep more than the limit of a message.
"""

from elastic.transport.acceptor import Acceptor, Peer
from elastic.transport.channel import PIECE_BYTES, Channel
from elastic.transport.dial import Dial, connect, connect_unix, listen_unix
from elastic.transport.frames import Header, WireError, to_plain
from elastic.transport.link import Link
from elastic.transport.typed import Vocabulary, build_parser

__all__ = [
    "PIECE_BYTES",
    "Acceptor",
    "Channel",
    "Dial",
    "Header",
    "Link",
    "Peer",
    "Vocabulary",
    "WireError",
    "build_parser",
    "connect",
    "connect_unix",
    "listen_unix",
    "to_plain",
]
