"""A trainer under Solvent's cluster: `elastic.run` at the end of a link to its host. Forked from the warm host."""

import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from cluster.runtime.link import Link, Message
from elastic import config as configs
from elastic import run as elastic_run
from elastic.errors import SolventError
from elastic.ports import Finished, Interrupted, Lost, Notice, Phase, Progress, Source, Stall, WorldSpec
from elastic.rundir import RunDir
from elastic.sinks import jsonl
from elastic.world import open_store


class LinkNotices:
    """Notices that the coordinator sends; a thread of the trainer's reads them, the training loop only looks."""

    def __init__(self, link: Link) -> None:
        self.go: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._notice: Notice | None = None
        threading.Thread(target=self._listen, args=(link,), name="link", daemon=True).start()

    def get_notice(self) -> Notice | None:
        """Return the pending notice at once."""
        return self._notice

    def _listen(self, link: Link) -> None:
        while (messages := link.receive()) is not None:
            for message in messages:
                if message["kind"] == "go":
                    self.go.put(message)
                elif message["kind"] == "park":
                    self._notice = Notice(source=message["reason"], deadline_s=message["deadline_s"])


class LinkObserver:
    """Sends what happens in training up the link: one message per step."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._step = 0
        self._phases: list[tuple[Phase, float, float]] = []

    def phase(self, phase: Phase, start_s: float, end_s: float) -> None:
        """Keep a stretch of time for the next message; loading and saving are told at once."""
        self._phases.append((phase, start_s, end_s))
        if phase in ("load", "save"):
            self._link.send("phases", phases=self._take_phases())

    def restored(self, progress: Progress, source: Source) -> None:
        """Tell where this attempt starts from."""
        self._step = progress.step
        self._link.send("restored", progress=asdict(progress), source=source)

    def stepped(self, progress: Progress, row: Mapping[str, object]) -> None:
        """Tell a finished step, with the time since the last one."""
        self._step = progress.step
        self._link.send("stepped", progress=asdict(progress), row=dict(row), phases=self._take_phases())

    def committed(self, progress: Progress) -> None:
        """Tell a checkpoint that became visible."""
        self._link.send("committed", progress=asdict(progress))

    def alive(self) -> None:
        """Let the host know that this process is not frozen."""
        self._link.send("alive")

    def stalled(self, stall: Stall) -> None:
        """Tell that there is no progress; the coordinator knows what the others say and ends the world if it must."""
        self._link.send("stalled", step=self._step, where=stall.where, waited_s=stall.waited_s)

    def _take_phases(self) -> list[tuple[Phase, float, float]]:
        phases, self._phases = self._phases, []
        return phases


def warm_up() -> None:
    """Pay for imports and first uses once, in the host."""
    elastic_run.warm_up()


def run(link: Link, fork: Message, *, node: str, node_ip: str) -> None:
    """Open a store, wait for the world, train, and say how it ended."""
    config = configs.from_dict(fork["config"])
    torch.set_num_threads(config.cluster.threads_per_worker)
    store = open_store(node_ip, timeout_s=config.fault.collective_timeout_s)
    notices = LinkNotices(link)
    link.send("ready", store_host=store.host, store_port=store.port, pid=os.getpid())
    go = notices.go.get()
    spec = WorldSpec(
        rank=go["rank"],
        world_size=go["world_size"],
        local_rank=go["local_rank"],
        local_world_size=go["local_world_size"],
        attempt=go["attempt"],
        store_host=go["store_host"],
        store_port=go["store_port"],
        node=node,
    )
    try:
        outcome = elastic_run.train(
            config,
            spec,
            notices=notices,
            observer=LinkObserver(link),
            open_sinks=lambda: [jsonl.build(config, RunDir(Path(config.storage) / config.run))],
            store=store if spec.rank == 0 else None,
        )
    except SolventError as error:
        link.send("outcome", outcome="failed", reason=str(error), exit_code=error.exit_code)
    except Exception as error:
        link.send("outcome", outcome="crashed", reason=f"{type(error).__name__}: {error}", exit_code=1)
        raise
    else:
        match outcome:
            case Finished():
                link.send("outcome", outcome="finished", reason="all steps done", exit_code=0)
            case Interrupted(reason=reason):
                link.send("outcome", outcome="interrupted", reason=reason, exit_code=3)
            case Lost(reason=reason):
                link.send("outcome", outcome="lost", reason=reason, exit_code=3)
