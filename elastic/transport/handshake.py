"""The greeting: both sides prove that they know the run's secret, without sending it; no I/O here.

    caller -> called    8 bytes that name this protocol, 32 bytes that nobody has used before
    caller <- called    32 more such bytes, and the proof: an HMAC-SHA256 under the secret
    caller -> called    its proof

Each proof is over both sides' bytes, the side that gives it and what the connection is for. So one that was overheard
opens nothing later, one side's never serves as the other's, and a replica server's never as a coordinator's. From the
same bytes come the keys of the seals (`frames`).
"""

import hmac
import secrets
from typing import Literal

from elastic.transport.frames import Seal, Seals, WireError

Purpose = Literal["coordinator", "replicas"]
"""Whom a caller wants to reach."""

HANDSHAKE_S = 5.0
"""Both sides answer at once; a machine that is overloaded may take its time."""
_MAGIC = b"Solvent2"
_NONCE_BYTES = 32
_PROOF_BYTES = 32


class Handshake:
    """One side's part. Send what `start` returns, and then for each `num_wanted` bytes what `feed` returns."""

    def __init__(self, secret: str, *, role: Literal["caller", "called"], purpose: Purpose) -> None:
        self.seals: Seals | None = None
        """Once the peer has proved itself."""
        self._secret = secret.encode()
        self._role, self._purpose = role, purpose
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonces = b""
        self._has = b""
        self._wanted_bytes = _NONCE_BYTES + (_PROOF_BYTES if role == "caller" else len(_MAGIC))

    @property
    def num_wanted(self) -> int:
        """How many bytes may be read from the peer now; what it sends after them is no greeting. 0: it is over."""
        return 0 if self.seals else self._wanted_bytes - len(self._has)

    def start(self) -> bytes:
        """Return what to send first."""
        return _MAGIC + self._nonce if self._role == "caller" else b""

    def feed(self, data: bytes) -> bytes:
        """Take some of the bytes that are wanted; return what to send next, maybe nothing.

        Raises:
            WireError: the peer does not know the secret, or speaks another language.
        """
        assert len(data) <= self.num_wanted
        self._has += data
        if not data:
            raise WireError("the peer closed the connection during the greeting")
        if (
            self._role == "called"
            and not self._nonces
            and not (self._has + _MAGIC[len(self._has) :]).startswith(_MAGIC)
        ):
            raise WireError("a first message that is no greeting is none of ours")
        if self.num_wanted:
            return b""
        has, self._has = self._has, b""
        if self._role == "caller":
            self._nonces = self._nonce + has[:_NONCE_BYTES]
            self._accept(has[_NONCE_BYTES:], peer="called")
            return self._prove("caller")
        if not self._nonces:
            self._nonces = has[len(_MAGIC) :] + self._nonce
            self._wanted_bytes = _PROOF_BYTES
            return self._nonce + self._prove("called")
        self._accept(has, peer="caller")
        return b""

    def _accept(self, proof: bytes, *, peer: Literal["caller", "called"]) -> None:
        if not hmac.compare_digest(proof, self._prove(peer)):
            raise WireError("the peer does not know the run's secret")
        by_caller, by_called = (Seal(self._derive(f"sealed by {side}")) for side in ("caller", "called"))
        self.seals = Seals(by_caller, by_called) if self._role == "caller" else Seals(by_called, by_caller)

    def _prove(self, role: Literal["caller", "called"]) -> bytes:
        return self._derive(f"proof of {role}")

    def _derive(self, label: str) -> bytes:
        return hmac.digest(self._secret, f"{label}, {self._purpose}\n".encode() + self._nonces, "sha256")
