"""Google Compute Engine: preemption of spot VMs, 30 s ahead, and host maintenance, from the metadata server.

Source: cloud.google.com/compute/docs: instances/spot, metadata/getting-live-migration-notice and
gpus/gpu-host-maintenance (2026-11-24). Neither notice carries a time. A VM with a longer `preemptionNoticeDuration`
(120 s, preview) says so nowhere in its metadata: set `fault.term_grace_s`. `GCE_METADATA_HOST`, which Google's own
libraries read, moves the endpoint.
"""

from collections.abc import Callable, Sequence
from urllib.parse import quote

from cluster.providers._base import Evidence, Feed, Machine, NodeNotice, Response, get_excerpt
from elastic.errors import NoticeError

_HOST = "metadata.google.internal"
_WAIT_S = 60
"""How long the server may hold a request back while nothing changes."""
PREEMPTION_LEAD_S = 30.0
MAINTENANCE_LEAD_S = 60.0
GPU_MAINTENANCE_LEAD_S = 3600.0


def detect(machine: Machine) -> Evidence:
    """Ask the machine's firmware what it is."""
    product = machine.read("/sys/class/dmi/id/product_name")
    if product in ("Google Compute Engine", "Google"):
        return Evidence(is_here=True, why=f"the firmware's product_name is {product!r}")
    return Evidence(is_here=False, why="the firmware names another product than Google Compute Engine")


def open_feeds(machine: Machine) -> list[Feed]:
    """Wait for changes of both values."""
    host = machine.env.get("GCE_METADATA_HOST", _HOST)
    has_gpu = (machine.root / "proc/driver/nvidia").exists()
    maintenance_s = GPU_MAINTENANCE_LEAD_S if has_gpu else MAINTENANCE_LEAD_S

    def parse_value(response: Response) -> Sequence[NodeNotice]:
        return parse_preempted(response, lead_s=machine.grace_s or PREEMPTION_LEAD_S)

    def parse_event(response: Response) -> Sequence[NodeNotice]:
        return parse_maintenance_event(response, lead_s=maintenance_s)

    return [
        _build_feed(machine, f"http://{host}", "instance/preempted", parse_value),
        _build_feed(machine, f"http://{host}", "instance/maintenance-event", parse_event),
    ]


def parse_preempted(response: Response, *, lead_s: float) -> Sequence[NodeNotice]:
    """Read TRUE or FALSE.

    Raises:
        NoticeError: it is neither, or not Google's server that answered.
    """
    if _parse_value(response, "instance/preempted", ("TRUE", "FALSE")) == "FALSE":
        return []
    return [NodeNotice(id="preempted", reason="preempted", lead_s=lead_s)]


def parse_maintenance_event(response: Response, *, lead_s: float) -> Sequence[NodeNotice]:
    """Read NONE, TERMINATE_ON_HOST_MAINTENANCE, or MIGRATE_ON_HOST_MAINTENANCE (which a VM survives).

    Raises:
        NoticeError: it is none of these, or not Google's server that answered.
    """
    known = ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")
    match _parse_value(response, "instance/maintenance-event", known):
        case "TERMINATE_ON_HOST_MAINTENANCE":
            return [NodeNotice(id="maintenance", reason="host maintenance (terminate)", lead_s=lead_s)]
        case "MIGRATE_ON_HOST_MAINTENANCE":
            return [NodeNotice(id="migration", reason="host maintenance (live migration)", kind="advice")]
        case _:
            return []


def _parse_value(response: Response, path: str, known: Sequence[str]) -> str:
    value = response.body[:100].decode("utf-8", errors="replace").strip().upper()
    if response.status != 200 or value not in known:
        raise NoticeError(f"{path} answered {get_excerpt(response)} instead of 200 and one of {', '.join(known)}.")
    if response.headers.get("metadata-flavor") != "Google":  # a proxy or captive portal that answers everything
        raise NoticeError(f"{path} was answered without Metadata-Flavor: Google, so not by Google's server.")
    return value


def _build_feed(machine: Machine, base: str, path: str, parse: Callable[[Response], Sequence[NodeNotice]]) -> Feed:
    """Return a feed that has the server answer as soon as the value is another than the one it saw last."""
    last_etag = "0"  # of no value: the first answer comes at once
    url = f"{base}/computeMetadata/v1/{path}"

    def read() -> Sequence[NodeNotice]:
        nonlocal last_etag
        query = f"wait_for_change=true&timeout_sec={_WAIT_S}&last_etag={quote(last_etag, safe='')}"
        response = machine.fetch(f"{url}?{query}", headers={"Metadata-Flavor": "Google"}, timeout_s=_WAIT_S + 5.0)
        try:
            notices = parse(response)
        except NoticeError:
            last_etag = "0"
            raise
        last_etag = response.headers.get("etag", "0")
        return notices

    # The pause is for servers that answer at once, changed or not (no ETag).
    return Feed(name=path, every_s=0.5, read=read, url=url)
