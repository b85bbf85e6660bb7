"""Lines of a job's log as people want to read them: without colors, half-drawn bars and Ray's own tracebacks.

The pod that submits the job shows its log through Ray's command line, which colors what it says itself whether or not
anybody sees colors, and which ends with pages of tracebacks whenever its head is lost.
"""

import re
from typing import Literal

Colors = Literal["keep", "strip"]

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\^_])")
"""Of ECMA-48: colors and moves of the cursor, titles of windows, and what has two characters."""
_BEGIN = "Traceback (most recent call last):"
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_RAYS = ("/ray/dashboard/modules/", "/ray/scripts/scripts.py")
"""Files of the command line that follows a job's log."""
_OURS = re.compile(r"/(cluster|elastic)/[\w/]+\.py")
_MOST_LINES = 2000
"""More than any traceback has: what is longer is shown."""


class LogLines:
    """Takes a log line by line and gives back what is to be shown.

    Args:
        colors: `keep` them for a terminal.
    """

    def __init__(self, *, colors: Colors) -> None:
        self._keeps_colors = colors == "keep"
        self._held: list[str] = []
        """A traceback, as far as it has come."""
        self._is_raised = False
        """Whether the held traceback has come to its exception."""

    def take(self, line: str) -> list[str]:
        """Take the next line; a traceback is held until it is over."""
        plain = _ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]
        shown = line if self._keeps_colors else plain
        if self._held:
            if self._continues(plain) and len(self._held) < _MOST_LINES:
                self._held.append(shown)
                return []
            return [*self.flush(), *self.take(line)]
        if plain == _BEGIN:
            self._held = [shown]
            return []
        if shown != line and not shown.strip():
            return []  # it was nothing but an escape, or the remains of a bar
        return [shown]

    def flush(self) -> list[str]:
        """Return what is held, at the end of the log."""
        held, self._held = self._held, []
        self._is_raised = False
        text = "\n".join(held)
        if any(file in text for file in _RAYS) and not _OURS.search(text):
            said = next(line for line in reversed(held) if line.strip())
            return [f"(the job's log broke off at the head: {' '.join(said.split())[:200]})"]
        return held

    def _continues(self, line: str) -> bool:
        if line == _BEGIN or line in _CHAINED:
            self._is_raised = False
            return True
        if not line or line.startswith(" "):
            return True
        if self._is_raised:
            return False
        self._is_raised = self._held[-1].startswith(" ")
        return self._is_raised
