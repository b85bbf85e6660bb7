"""One file per provider of machines: how to know that we are on one, and where it says that a node will go.

To add one, write `<name>.py` with two functions (`Provider`):

- `detect(machine) -> Evidence`: looks at files and the environment through `machine`, in no time;
- `open_feeds(machine) -> list[Feed]`: each feed has a `read()` that returns the notices that hold now. Keep what turns
  an answer into notices in a pure function of a `Response`, which raises `NoticeError` for what it cannot understand.

Polling, repetition, moved and withdrawn notices, faults and the drain are the node watch's business, not the file's.
`tests/contract/test_providers.py` picks the file up unasked.
"""

from typing import cast

from cluster.providers._base import (
    Evidence,
    Feed,
    Machine,
    NodeNotice,
    Provider,
    Response,
    SelfDrain,
    get_date_skew_s,
)
from cluster.providers._http import fetch
from cluster.providers._sigterm import RAY_DEFAULT_S, RAY_SETTING
from elastic import plugins
from elastic.errors import ConfigError

__all__ = [
    "RAY_DEFAULT_S",
    "RAY_SETTING",
    "Evidence",
    "Feed",
    "Machine",
    "NodeNotice",
    "Provider",
    "Response",
    "SelfDrain",
    "check_choice",
    "choose",
    "detect_all",
    "fetch",
    "get_date_skew_s",
    "load",
]

ALWAYS = "plain"
"""Read on every machine: whoever runs it may know more than its provider says."""


def load(name: str) -> Provider:
    """Import a provider's file.

    Raises:
        ConfigError: there is none of this name.
    """
    return cast(Provider, plugins.load(__name__, name, key="cluster.notices"))


def check_choice(notices: str) -> None:
    """Refuse a value of `cluster.notices` that is no choice.

    Raises:
        ConfigError: neither auto, off nor a provider.
    """
    names = plugins.get_names(__name__)
    if notices not in ("auto", "off", *names):
        raise ConfigError(f"cluster.notices={notices!r} is not known. Use auto, off or one of: {', '.join(names)}.")


def detect_all(machine: Machine) -> dict[str, Evidence]:
    """Return what each provider thinks of this machine."""
    return {name: load(name).detect(machine) for name in plugins.get_names(__name__)}


def choose(notices: str, machine: Machine) -> list[str]:
    """Return whose notices to read: for auto, every provider that is here (a pod runs on somebody's machine).

    Args:
        notices: the value of `cluster.notices`.

    Raises:
        ConfigError: it is no choice.
    """
    check_choice(notices)
    if notices == "off":
        return []
    if notices == "auto":
        return [name for name, evidence in detect_all(machine).items() if evidence.is_here]
    return sorted({notices, ALWAYS})
