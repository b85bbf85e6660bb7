"""Amazon EC2: interruptions of spot instances, 120 s ahead, from the instance metadata service (IMDSv2).

Source: docs.aws.amazon.com/AWSEC2/latest/UserGuide: spot-instance-termination-notices, rebalance-recommendations and
instancedata-data-retrieval (2026-11-24). A container needs a hop limit of 2 on the instance's metadata options.
`AWS_EC2_METADATA_SERVICE_ENDPOINT`, which Amazon's own tools read, moves the endpoint.
"""

import threading
from collections.abc import Sequence

from cluster.providers._base import Evidence, Feed, Machine, NodeNotice, Response, get_excerpt, parse_object, parse_time
from elastic.errors import NoticeError

_ENDPOINT = "http://169.254.169.254"
_TOKEN_TTL_S = 6 * 3600
_ACTIONS = ("terminate", "stop", "hibernate")
_EVERY_S = 1.0
"""Amazon recommends 5 s; the service takes 1024 requests a second, and seconds count."""


def detect(machine: Machine) -> Evidence:
    """Ask the machine's firmware who built it."""
    for name in ("sys_vendor", "board_vendor", "bios_vendor"):
        vendor = machine.read(f"/sys/class/dmi/id/{name}")
        if vendor == "Amazon EC2":
            return Evidence(is_here=True, why=f"the firmware's {name} is {vendor!r}")
    uuid = machine.read("/sys/hypervisor/uuid")
    if uuid.startswith("ec2"):  # Xen instances have another vendor
        return Evidence(is_here=True, why=f"the hypervisor's uuid is {uuid!r}")
    return Evidence(is_here=False, why="the firmware names another vendor than Amazon EC2")


def open_feeds(machine: Machine) -> list[Feed]:
    """Read the interruption, and the recommendation that may come before it."""
    session = _Session(machine)
    return [
        Feed(
            name="spot/instance-action",
            every_s=_EVERY_S,
            read=lambda: parse_instance_action(session.get("/latest/meta-data/spot/instance-action")),
            url=session.endpoint,
        ),
        Feed(
            name="events/recommendations/rebalance",
            every_s=5 * _EVERY_S,
            read=lambda: parse_rebalance(session.get("/latest/meta-data/events/recommendations/rebalance")),
            url=session.endpoint,
        ),
    ]


def parse_instance_action(response: Response) -> Sequence[NodeNotice]:
    """Read `{"action": "terminate", "time": "2026-01-31T12:00:00Z"}`; 404 means that nothing is planned.

    Raises:
        NoticeError: it is anything else.
    """
    if response.status == 404:
        return []
    fields = parse_object(response, what="spot/instance-action")
    action = fields.get("action")
    if action not in _ACTIONS:
        raise NoticeError(f"spot/instance-action has action={action!r}, which is none of {', '.join(_ACTIONS)}.")
    # Hibernation begins at once, and its time is that of the notice.
    deadline_s = response.to_our_time(parse_time(fields.get("time"), what="spot/instance-action: time"))
    return [NodeNotice(id="interruption", reason=f"spot interruption ({action})", deadline_s=deadline_s)]


def parse_rebalance(response: Response) -> Sequence[NodeNotice]:
    """Read `{"noticeTime": "2026-01-31T12:00:00Z"}`: the risk is higher than usual, and no time is named.

    Raises:
        NoticeError: it is anything else, and not a 404 either.
    """
    if response.status == 404:
        return []
    fields = parse_object(response, what="events/recommendations/rebalance")
    parse_time(fields.get("noticeTime"), what="events/recommendations/rebalance: noticeTime")
    return [NodeNotice(id="rebalance", reason="rebalance recommendation", kind="advice")]


class _Session:
    """Requests under a session token, which is fetched anew when it nears its end or is refused."""

    def __init__(self, machine: Machine) -> None:
        self.endpoint = machine.env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _ENDPOINT).rstrip("/")
        self._machine = machine
        self._token = ""
        self._renew_s = 0.0
        self._lock = threading.Lock()  # both feeds ask at once at first, and one token does

    def get(self, path: str) -> Response:
        """Ask with a token; once more with a new one if it is refused."""
        token = self._get_token(refused="")
        response = self._machine.fetch(self.endpoint + path, headers={"X-aws-ec2-metadata-token": token})
        if response.status == 401:
            token = self._get_token(refused=token)
            response = self._machine.fetch(self.endpoint + path, headers={"X-aws-ec2-metadata-token": token})
        return response

    def _get_token(self, *, refused: str) -> str:
        with self._lock:
            if self._token == refused or self._machine.now_s() >= self._renew_s:
                self._fetch_token()
            return self._token

    def _fetch_token(self) -> None:
        response = self._machine.fetch(
            f"{self.endpoint}/latest/api/token",
            method="PUT",
            headers={"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)},
        )
        token = response.body.decode("latin-1").strip()
        if response.status != 200 or not token.isascii() or not token.isprintable() or not token:
            raise NoticeError(f"latest/api/token answered {get_excerpt(response)} instead of a token.")
        ttl = response.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        ttl_s = int(ttl) if ttl.isdecimal() else _TOKEN_TTL_S
        self._token, self._renew_s = token, self._machine.now_s() + 0.9 * ttl_s
