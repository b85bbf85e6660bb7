"""Microsoft Azure: scheduled events (eviction at least 30 s ahead, reboots and redeployments minutes ahead).

Source: learn.microsoft.com/azure/virtual-machines/linux/scheduled-events (2026-11-24). The first request of a VM turns
the service on, which may take two minutes. Events are those of the whole scale set, so our own are found by our name;
acknowledging one lets Azure go ahead with *all* of its machines, so only the coordinator decides that (`Coordinator`).
`SOLVENT_AZURE_METADATA` moves the endpoint.
"""

import json
from collections.abc import Sequence
from typing import Any

from cluster.providers._base import Evidence, Feed, Machine, NodeNotice, Response, get_excerpt, parse_object, parse_time
from elastic.errors import NoticeError

_ENDPOINT = "http://169.254.169.254"
_CHASSIS = "7783-7084-3265-9085-8269-3286-77"
"""The asset tag of every Azure VM; the vendor alone could be any Hyper-V."""
_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_FIRST_TIMEOUT_S = 130.0
_LEAVING = ("Preempt", "Terminate", "Reboot", "Redeploy")
"""What ends what runs on a VM; at a Freeze it stands still for some seconds and goes on."""


def detect(machine: Machine) -> Evidence:
    """Ask the machine's chassis."""
    tag = machine.read("/sys/class/dmi/id/chassis_asset_tag")
    if tag == _CHASSIS:
        return Evidence(is_here=True, why=f"the chassis asset tag is {tag}")
    return Evidence(is_here=False, why="the chassis asset tag is not that of Azure VMs")


def open_feeds(machine: Machine) -> list[Feed]:
    """Read the scheduled events."""
    events = _ScheduledEvents(machine)
    return [
        Feed(
            name="scheduledevents",
            every_s=1.0,  # as Microsoft recommends
            read=events.read,
            url=events.endpoint + _EVENTS,
            acknowledge=events.acknowledge,
        )
    ]


def parse_events(response: Response, *, name: str) -> Sequence[NodeNotice]:
    """Read the events that name this VM.

    Args:
        name: of this VM, as `Resources` of an event has it.

    Raises:
        NoticeError: the answer is no document of this service.
    """
    document = parse_object(response, what="scheduledevents")
    events: Any = document.get("Events")
    if not isinstance(document.get("DocumentIncarnation"), int) or not isinstance(events, list):
        raise NoticeError(f"scheduledevents answered {get_excerpt(response)}: no DocumentIncarnation and Events.")
    notices = [_parse_event(event, response, name) for event in events]
    return [notice for notice in notices if notice]


def _parse_event(event: Any, response: Response, name: str) -> NodeNotice | None:
    """Read one event; None if it is for others."""
    resources: Any = event.get("Resources") if isinstance(event, dict) else None
    if not isinstance(resources, list) or not all(isinstance(resource, str) for resource in resources):
        raise NoticeError(f"scheduledevents answered {get_excerpt(response)}: an event without Resources.")
    if name not in resources:
        return None
    event_id, kind, status = event.get("EventId"), event.get("EventType"), event.get("EventStatus")
    if not isinstance(event_id, str) or not event_id or not isinstance(kind, str):
        raise NoticeError(f"scheduledevents has an event with EventId={event_id!r} and EventType={kind!r}.")
    if kind not in _LEAVING:
        return NodeNotice(id=event_id, reason=f"scheduled event {kind}", kind="advice")
    not_before = event.get("NotBefore")
    deadline_s = response.received_s  # it has begun, and its time is blank
    if status != "Started" and not_before:
        deadline_s = response.to_our_time(parse_time(not_before, what="scheduledevents: NotBefore"))
    return NodeNotice(
        id=event_id, reason=f"scheduled event {kind}", deadline_s=deadline_s, machine=name, machines=tuple(resources)
    )


def build_acknowledgement(notice: NodeNotice) -> bytes:
    """Return the body that lets an event begin."""
    return json.dumps({"StartRequests": [{"EventId": notice.id}]}).encode()


class _ScheduledEvents:
    """The service, seen from one VM."""

    def __init__(self, machine: Machine) -> None:
        self.endpoint = machine.env.get("SOLVENT_AZURE_METADATA", _ENDPOINT).rstrip("/")
        self._machine = machine
        self._name = ""
        self._incarnation: object = None
        self._notices: Sequence[NodeNotice] = ()
        self._timeout_s = _FIRST_TIMEOUT_S

    def read(self) -> Sequence[NodeNotice]:
        """Ask for the events; a document that was read before is not read again."""
        if not self._name:
            self._name = self._fetch_name()
        response = self._machine.fetch(self.endpoint + _EVENTS, headers={"Metadata": "true"}, timeout_s=self._timeout_s)
        self._timeout_s = 5.0
        incarnation = parse_object(response, what="scheduledevents").get("DocumentIncarnation")
        if incarnation is None or incarnation != self._incarnation:
            self._notices = parse_events(response, name=self._name)
            self._incarnation = incarnation
        return self._notices

    def acknowledge(self, notice: NodeNotice) -> None:
        """Let the event begin, for all machines that it names."""
        response = self._machine.fetch(
            self.endpoint + _EVENTS, method="POST", headers={"Metadata": "true"}, body=build_acknowledgement(notice)
        )
        if response.status != 200:
            raise NoticeError(f"StartRequests for event {notice.id} was answered with {get_excerpt(response)}.")

    def _fetch_name(self) -> str:
        response = self._machine.fetch(self.endpoint + _NAME, headers={"Metadata": "true"})
        name = response.body[:200].decode("utf-8", errors="replace").strip()
        if response.status != 200 or not name or "<" in name:
            raise NoticeError(f"instance/compute/name answered {get_excerpt(response)} instead of this VM's name.")
        return name
