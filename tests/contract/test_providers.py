"""What every file of `cluster/providers` must keep to, and how notices come through against servers over HTTP."""

import json
import os
import socket
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from cluster.node_watch import NodeWatch
from cluster.providers import Machine, NodeNotice, Response, SelfDrain, choose, fetch, load
from elastic.errors import ConfigError, NoticeError
from elastic.plugins import get_names
from tests.contract._clouds import Aws, Azure, Gcp, Kubernetes
from tests.ray._traces import wait_until

NODE = "0123456789abcdef"
NAMES = get_names("cluster.providers")
FULL_ENV = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "NODE_NAME": "n",
    "HOSTNAME": "p",
    "RUNPOD_POD_ID": "abc",
    "VAST_CONTAINERLABEL": "C.123",
}


def build_machine(tmp_path, env=None, **fields):
    fields = {"node": NODE, "fetch": fetch, "now_s": time.time, **fields}
    return Machine(env=env or {}, folder=tmp_path, root=tmp_path, **fields)


def refuse(*args, **kwargs):
    raise AssertionError("asked the network")


# ---- every file


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_without_marks_is_nobodys_and_nobody_asks_the_network_about_that(name, tmp_path):
    evidence = load(name).detect(build_machine(tmp_path, fetch=refuse))
    assert evidence.is_here == (name == "plain")
    assert evidence.why


@pytest.mark.parametrize("name", NAMES)
def test_a_feed_that_gets_no_answer_says_so_with_an_error_that_the_watch_knows(name, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    account = tmp_path / "var/run/secrets/kubernetes.io/serviceaccount"
    account.mkdir(parents=True)
    (account / "token").write_text("t")
    (account / "namespace").write_text("n")
    env = {
        **FULL_ENV,
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{nobody}",
        "GCE_METADATA_HOST": nobody,
        "SOLVENT_AZURE_METADATA": f"http://{nobody}",
        "SOLVENT_KUBERNETES_URL": f"http://{nobody}",
    }
    for feed in load(name).open_feeds(build_machine(tmp_path, env)):
        assert feed.every_s <= 5
        if feed.url:
            with pytest.raises(OSError):
                feed.read()
        else:
            assert feed.read() == []


FIELDS = [
    *("action", "time", "noticeTime", "DocumentIncarnation", "Events", "Resources", "EventId", "EventType"),
    *("EventStatus", "NotBefore", "kind", "metadata", "spec", "taints", "labels", "key", "deletionTimestamp"),
    "terminationGracePeriodSeconds",
]
RESPONSES = st.builds(
    Response,
    status=st.sampled_from([200, 200, 204, 302, 401, 404, 429, 500, 503]),
    headers=st.dictionaries(
        st.sampled_from(["date", "etag", "metadata-flavor"]), st.one_of(st.just("Google"), st.text(max_size=30))
    ),
    body=st.one_of(
        st.binary(max_size=200),
        st.just(b"<html><body>Sign in</body></html>"),
        st.sampled_from([b"TRUE", b"NONE", b"[" * 100_000, b"null", b'{"action": "stop", "time": 5}']),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(FIELDS),
                    inner | st.sampled_from(["Pod", "Node", "terminate", "n", "Preempt", "2026-01-31T12:00:00Z"]),
                    max_size=6,
                )
            ),
            max_leaves=20,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    received_s=st.just(1.8e9),
)


@pytest.mark.parametrize("name", NAMES)
@given(responses=st.lists(RESPONSES, min_size=1, max_size=4))
def test_whatever_a_server_answers_is_notices_or_an_error_that_the_watch_knows(name, responses, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "account"
    account = folder / "var/run/secrets/kubernetes.io/serviceaccount"
    account.mkdir(parents=True, exist_ok=True)
    (account / "token").write_text("t")
    (account / "namespace").write_text("n")
    answers = iter(responses * 20)
    machine = build_machine(folder, FULL_ENV, fetch=lambda *args, **kwargs: next(answers))
    for feed in load(name).open_feeds(machine):
        for _ in range(2):
            try:
                notices = feed.read()
            except NoticeError as error:
                assert str(error)
            else:
                assert all(isinstance(notice, NodeNotice) and notice.id for notice in notices)


# ---- whose notices


@pytest.mark.parametrize(
    ("files", "env", "names"),
    [
        ({"sys_vendor": "Amazon EC2"}, {}, ["aws", "plain"]),
        ({"product_name": "Google Compute Engine"}, {"KUBERNETES_SERVICE_HOST": "h"}, ["gcp", "kubernetes", "plain"]),
        ({"chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"}, {}, ["azure", "plain"]),
        ({"sys_vendor": "QEMU"}, {"RUNPOD_POD_ID": "x"}, ["plain", "runpod"]),
        ({}, {"VAST_CONTAINERLABEL": "C.77"}, ["plain", "vast"]),
        ({"sys_vendor": "Microsoft Corporation"}, {}, ["plain"]),  # some Hyper-V
    ],
)
def test_auto_reads_every_provider_that_leaves_its_mark_on_the_machine(files, env, names, tmp_path):
    firmware = tmp_path / "sys/class/dmi/id"
    firmware.mkdir(parents=True)
    for name, text in files.items():
        (firmware / name).write_text(text + "\n")
    machine = build_machine(tmp_path, env)
    assert choose("auto", machine) == names
    assert choose("off", machine) == []
    assert choose("gcp", machine) == ["gcp", "plain"]
    with pytest.raises(ConfigError, match="Use auto, off or one of: aws"):
        choose("asw", machine)


# ---- notices over HTTP


class Watched:
    """A watch whose drain requests and news are recorded; it reads ten times as often as usual, unless told."""

    def __init__(self, name, machine, *, leave_before_s=600.0, speed=10.0):
        self.drains: list[tuple[float, object]] = []
        self.news = []
        self.feeds = [replace(feed, every_s=feed.every_s / speed) for feed in load(name).open_feeds(machine)]
        self.watch = NodeWatch(
            {name: self.feeds},
            drain=lambda departure: self.drains.append((time.time(), departure)),
            tell=self.news.append,
            now_s=time.time,
            leave_before_s=leave_before_s,
            error_pause_s=1.0 / speed,
        )
        self.watch.start()

    @property
    def lines(self):
        return [line for news in list(self.news) for line in news.lines]

    def wait_for_drain(self, number=1, *, timeout_s=8.0):
        wait_until(lambda: len(self.drains) >= number, timeout_s=timeout_s, what=lambda: str(self.lines), every_s=0.01)
        return self.drains[number - 1]

    def wait_for_line(self, text, *, timeout_s=8.0):
        wait_until(lambda: any(text in line for line in self.lines), timeout_s=timeout_s, what=lambda: str(self.lines))


@pytest.fixture
def watch(tmp_path):
    """Watch a machine for a provider until the test ends."""
    watched = []

    def start(name, env=None, *, leave_before_s=600.0, speed=10.0, **fields):
        machine = build_machine(tmp_path, env, **fields)
        watched.append(Watched(name, machine, leave_before_s=leave_before_s, speed=speed))
        return watched[-1]

    yield start
    for one in watched:
        one.watch.close()


@pytest.fixture(params=["aws", "gcp", "azure", "kubernetes"])
def cloud(request, tmp_path):
    """A provider's name and its server."""
    servers = {"aws": Aws, "gcp": Gcp, "azure": Azure, "kubernetes": lambda: Kubernetes(tmp_path)}
    server = servers[request.param]()
    yield request.param, server
    server.close()


def test_a_notice_becomes_a_drain_with_its_deadline_in_a_second_and_one_poll(cloud, watch):
    name, server = cloud
    watched = watch(name, server.get_env(), speed=1.0)
    wait_until(lambda: server.requests, timeout_s=5, what="a first request")
    time.sleep(0.3)
    assert (watched.drains, watched.lines) == ([], [])
    given_s = time.time()
    deadline_s = server.give(30)
    drained_s, departure = watched.wait_for_drain()
    every_s = max(feed.every_s for feed in watched.feeds if feed.url and "rebalance" not in feed.name)
    assert drained_s - given_s < 1 + every_s
    assert departure.provider == name
    # Google names no time, so ours begins when we hear of it
    assert departure.deadline_s == pytest.approx(deadline_s, abs=1 if name == "gcp" else 1e-3)


def test_a_repeated_notice_is_drained_once_a_moved_one_again_and_a_withdrawn_one_is_said(cloud, watch):
    name, server = cloud
    watched = watch(name, server.get_env())
    server.give(30)
    watched.wait_for_drain()
    if name != "gcp":
        deadline_s = server.give(90)
        assert watched.wait_for_drain(2)[1].deadline_s == deadline_s
    time.sleep(0.7)  # some more readings of the same
    assert len(watched.drains) == (1 if name == "gcp" else 2)
    server.withdraw()
    watched.wait_for_line("was withdrawn")
    watched.wait_for_line("Ray cannot take a drain back")


@pytest.mark.parametrize(
    "fault", [(500, "oops"), (404, "<html>nginx</html>"), (200, "<html>Sign in</html>"), (200, "")]
)
def test_a_server_out_of_order_is_said_once_withdraws_nothing_and_is_read_again_when_it_works(cloud, watch, fault):
    name, server = cloud
    server.fault = fault
    watched = watch(name, server.get_env())
    wait_until(lambda: len(server.requests) >= 4, timeout_s=10, what="it asks again and again")
    assert not watched.drains
    said = [line for line in watched.lines if "answered" in line or "instance/" in line or "asked for" in line]
    assert 1 <= len(said) <= 2  # one for each feed
    server.fault = None
    server.give(30)
    watched.wait_for_drain()
    server.fault = fault
    if name == "gcp":
        server.put("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # ends a request that waits
    time.sleep(0.5)
    if (name, *fault[:1]) != ("aws", 404):  # there, that is the word for nothing
        assert not any("withdrawn" in line for line in watched.lines)


@pytest.mark.parametrize("skew_s", [-3600, 3600])
def test_a_deadline_is_taken_by_our_clock_if_the_server_has_another(cloud, watch, skew_s):
    name, server = cloud
    server.skew_s = skew_s
    deadline_s = server.give(30)
    watched = watch(name, server.get_env())
    _, departure = watched.wait_for_drain()
    assert departure.deadline_s == pytest.approx(deadline_s, abs=1.1)  # a Date header has whole seconds


def test_a_server_that_hangs_keeps_no_other_feed_from_its_notice(watch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        machine = build_machine(tmp_path, env)
        feeds = {"aws": load("aws").open_feeds(machine), "plain": load("plain").open_feeds(machine)}
        drains, news = [], []
        watch = NodeWatch(feeds, drain=drains.append, tell=news.append, now_s=time.time, leave_before_s=600)
        watch.start()
        feeds["plain"][1].read()
        (tmp_path / f"{feeds['plain'][2].name}").write_text("20")
        wait_until(lambda: drains, timeout_s=1.5, what="the drain")
        wait_until(lambda: any("no answer (timed out)" in n.lines[0] for n in news if n.lines), timeout_s=5, what=news)
        watch.close()


def test_a_drain_that_fails_is_asked_for_again(tmp_path):
    (tmp_path / "notice").write_text("20")
    machine = build_machine(tmp_path, {"SOLVENT_NOTICE_FILE": str(tmp_path / "notice")})
    calls, lines = [], []

    def drain(departure):
        calls.append(departure)
        if len(calls) < 3:
            raise NoticeError("not now")

    watch = NodeWatch(
        {"plain": load("plain").open_feeds(machine)},
        drain=drain,
        tell=lambda news: lines.extend(news.lines),
        now_s=time.time,
        leave_before_s=600,
    )
    watch.start()
    wait_until(lambda: len(calls) == 3, timeout_s=5, what="three attempts")
    time.sleep(0.6)
    watch.close()
    assert len(calls) == 3
    assert [line for line in lines if "not now" in line] == ["drain: Ray does not drain the node: not now"]


def test_maintenance_that_is_days_ahead_waits_until_it_is_due(watch):
    server = Azure()
    deadline_s = server.give(3602)
    watched = watch("azure", server.get_env(), leave_before_s=3600)
    watched.wait_for_line("gone in 360")
    assert not watched.drains
    assert watched.wait_for_drain()[1].deadline_s == deadline_s
    server.close()


# ---- Amazon


def test_an_instance_action_is_read_under_a_token_that_is_renewed_when_it_is_refused(watch):
    server = Aws()
    watched = watch("aws", server.get_env())
    wait_until(lambda: len(server.requests) >= 4, timeout_s=5, what="some readings")
    assert [path for method, path in server.requests if method == "PUT"] == ["/latest/api/token"]
    server.tokens = set()
    deadline_s = server.give(120)
    assert watched.wait_for_drain()[1].deadline_s == deadline_s
    assert server.num_tokens in (2, 3)  # two feeds share it
    server.close()


def test_a_rebalance_recommendation_is_told_and_moves_nobody(watch):
    server = Aws()
    server.rebalance = json.dumps({"noticeTime": server.to_rfc3339(time.time())})
    watched = watch("aws", server.get_env())
    watched.wait_for_line("rebalance recommendation (advice: the node stays)")
    assert not watched.drains
    server.close()


def test_the_token_dance_works_with_another_server_whose_instance_action_is_broken(watch):
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    watched = watch("aws", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{host}:{port}"})
    watched.wait_for_line("spot/instance-action answered HTTP 500")  # it got a token
    time.sleep(0.5)
    assert len(watched.lines) <= 2  # once for each feed
    moto.stop()


# ---- Google


def test_a_waiting_request_returns_as_soon_as_the_value_changes(watch):
    server = Gcp()
    watched = watch("gcp", server.get_env())
    time.sleep(1.5)
    num_requests = len(server.requests)
    assert num_requests == 4  # a first answer for each value, then each waits
    server.give(30)
    drained_s, departure = watched.wait_for_drain()
    assert departure.deadline_s - drained_s == pytest.approx(30, abs=0.2)
    server.close()


def test_a_true_that_is_not_googles_moves_nobody(watch):
    answer = Response(status=200, headers={"etag": "1"}, body=b"TRUE", received_s=time.time())
    watched = watch("gcp", fetch=lambda *args, **kwargs: answer)
    watched.wait_for_line("not by Google's server")
    assert not watched.drains


def test_the_configured_lead_time_replaces_googles_usual_one(watch):
    server = Gcp()
    watched = watch("gcp", server.get_env(), grace_s=120.0)
    given_s = server.give(30) - 30
    assert watched.wait_for_drain()[1].deadline_s - given_s == pytest.approx(120, abs=1)
    server.close()


@pytest.mark.parametrize(("has_gpu", "lead_s"), [(False, 60), (True, 3600)])
def test_host_maintenance_ends_a_vm_in_a_minute_and_one_with_a_gpu_in_an_hour(watch, tmp_path, has_gpu, lead_s):
    if has_gpu:
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    server = Gcp()
    watched = watch("gcp", server.get_env(), leave_before_s=7200)
    server.put("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    watched.wait_for_line("live migration) (advice")
    server.put("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    drained_s, departure = watched.wait_for_drain()
    assert departure.deadline_s - drained_s == pytest.approx(lead_s, abs=0.2)
    server.close()


# ---- Microsoft


def test_events_of_other_vms_and_freezes_move_nobody_and_one_that_has_started_is_due_now(watch):
    server = Azure()
    soon_s = time.time() + 60
    others = server.build_event(soon_s, EventId="a", Resources=["trainers_4"])
    freeze = server.build_event(soon_s, EventId="b", EventType="Freeze")
    server.put(others, freeze)
    watched = watch("azure", server.get_env())
    watched.wait_for_line("scheduled event Freeze (advice")
    time.sleep(0.3)
    assert not watched.drains
    server.put(others, freeze, server.build_event(0, EventId="c", EventStatus="Started", NotBefore=""))
    drained_s, departure = watched.wait_for_drain()
    assert departure.deadline_s == pytest.approx(drained_s, abs=0.5)
    server.close()


def test_an_event_is_acknowledged_only_when_told_and_again_if_that_failed(watch):
    server = Azure()
    server.give(60)
    watched = watch("azure", server.get_env())
    watched.wait_for_drain()
    (report,) = watched.news[0].reports
    assert (report.machine, report.machines) == (server.name, (server.name,))
    time.sleep(0.3)
    assert server.started == []
    server.fault = (500, "")
    watched.watch.acknowledge(report.id)
    time.sleep(0.3)
    server.fault = None
    watched.wait_for_line("acknowledged")
    assert server.started == [report.id]
    time.sleep(0.4)
    assert server.started == [report.id]
    server.close()


# ---- Kubernetes and signals


def test_the_signal_means_the_pods_own_grace_period_or_rays_if_that_is_shorter(watch, tmp_path):
    server = Kubernetes(tmp_path)
    signals = []
    watched = watch("kubernetes", server.get_env(), get_self_drain=lambda: signals[0] if signals else None)
    wait_until(lambda: len(server.requests) >= 2, timeout_s=5, what="it knows the pod")
    started_s = time.time()
    signals.append(SelfDrain(started_s=started_s, lead_s=30.0))
    assert watched.wait_for_drain()[1].deadline_s == started_s + server.grace_s
    server.close()


@pytest.mark.parametrize(
    ("name", "fields", "ray_s", "lead_s"),
    [
        ("runpod", {}, 30.0, 5.0),
        ("kubernetes", {}, 60.0, 30.0),
        ("kubernetes", {"env": {"SOLVENT_GRACE_S": "15"}}, 30.0, 15.0),
        ("plain", {}, 30.0, 30.0),
        ("plain", {}, 110.0, 110.0),
        ("plain", {"grace_s": 12.0}, 30.0, 12.0),
        ("plain", {"grace_s": 120.0}, 30.0, 30.0),  # Ray itself ends then
    ],
)
def test_the_signal_means_what_the_machine_grants_and_not_rays_setting(watch, name, fields, ray_s, lead_s):
    started_s = time.time()
    watched = watch(name, get_self_drain=lambda: SelfDrain(started_s=started_s, lead_s=ray_s), **fields)
    assert watched.wait_for_drain()[1].deadline_s == started_s + lead_s


def test_taints_that_end_a_node_count_and_a_cordon_is_advice(watch, tmp_path):
    server = Kubernetes(tmp_path)
    server.taints = [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]
    watched = watch("kubernetes", server.get_env())
    watched.wait_for_line("cordoned")
    assert not watched.drains
    server.taints.append({"key": "cloud.google.com/impending-node-termination", "effect": "NoSchedule"})
    drained_s, departure = watched.wait_for_drain()
    assert departure.deadline_s - drained_s == pytest.approx(server.grace_s, abs=0.5)
    server.close()


def test_the_label_by_which_coreweave_announces_a_preemption_is_a_notice(watch, tmp_path):
    server = Kubernetes(tmp_path)
    server.labels["qos.coreweave.cloud/pending-preemption"] = "false"
    server.taints = [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]
    watched = watch("kubernetes", server.get_env())
    watched.wait_for_line("cordoned")
    assert not watched.drains
    server.labels["qos.coreweave.cloud/pending-preemption"] = "true"
    drained_s, departure = watched.wait_for_drain()
    assert "CoreWeave takes the node" in departure.reason
    assert departure.deadline_s - drained_s == pytest.approx(server.grace_s, abs=0.5)
    server.close()


def test_a_service_account_without_rights_is_told_what_it_lacks(watch, tmp_path):
    server = Kubernetes(tmp_path)
    watched = watch("kubernetes", {**server.get_env(), "NODE_NAME": "gke-2"})
    watched.wait_for_line("Bind it to a role with the verb get on pods and nodes")
    server.close()


# ---- any machine


def test_a_notice_file_holds_seconds_or_a_time_moves_and_is_withdrawn(watch, tmp_path):
    path = tmp_path / "notice"
    watched = watch("plain", {"SOLVENT_NOTICE_FILE": str(path)})
    written_s = time.time()
    path.write_text("25\n")
    assert watched.wait_for_drain()[1].deadline_s == pytest.approx(written_s + 25, abs=0.1)
    path.write_text("2099-01-31T12:00:00+01:00")
    watched.wait_for_line("was moved: gone in")
    path.unlink()
    watched.wait_for_line("was withdrawn")


def test_the_file_of_a_node_is_for_that_node_alone(watch, tmp_path):
    path = tmp_path / "notice"
    (tmp_path / f"notice-{NODE[:12]}").write_text("25")
    mine = watch("plain", {"SOLVENT_NOTICE_FILE": str(path)})
    other = watch("plain", {"SOLVENT_NOTICE_FILE": str(path)}, node="f" * 16)
    mine.wait_for_drain()
    time.sleep(0.6)
    assert not other.drains


@pytest.mark.parametrize(
    ("text", "problem"),
    [("soon", "no time such as"), ("-3", "0 or more"), ("nan", "0 or more"), ("2020-01-01T00:00:00Z", "left over")],
)
def test_a_notice_file_that_makes_no_sense_is_said(watch, tmp_path, text, problem):
    (tmp_path / "notice").write_text(text)
    watched = watch("plain", {"SOLVENT_NOTICE_FILE": str(tmp_path / "notice")})
    watched.wait_for_line(problem)
    assert not watched.drains


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_notice_file_of_another_user_is_not_believed(watch, tmp_path):
    path = tmp_path / "notice"
    path.touch()
    os.chown(path, 12345, 12345)
    path.write_text("25")
    watched = watch("plain", {"SOLVENT_NOTICE_FILE": str(path)})
    watched.wait_for_line("belongs to user 12345")
    assert not watched.drains


def post(url, body, token="12345678", method="POST"):
    request = urllib.request.Request(url, data=body, method=method, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_hook_takes_notices_from_who_knows_its_token(watch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    watched = watch("plain", {"SOLVENT_NOTICE_HOOK": f"{port}:12345678"})
    url = f"http://127.0.0.1:{port}/notice"
    assert post(url, b'{"seconds_left": 25}', token="87654321") == 401
    assert post(url.replace("notice", "elsewhere"), b'{"seconds_left": 25}') == 404
    for body in (b"", b"[]", b'{"seconds_left": "x"}', b'{"seconds_left": -1}', b'{"deadline": "x"}', b"\xff" * 9):
        assert post(url, body) == 400
    assert not watched.drains
    given_s = time.time()
    assert post(url, b'{"seconds_left": 25, "reason": "the lease ends"}') == 200
    drained_s, departure = watched.wait_for_drain()
    assert drained_s - given_s < 1
    assert departure.deadline_s == pytest.approx(given_s + 25, abs=0.5)
    assert departure.reason == "the lease ends"
    assert post(url, b"", method="DELETE") == 200
    watched.wait_for_line("was withdrawn")


@pytest.mark.parametrize("hook", ["", "80", "x:12345678", "99999:12345678", "0:short"])
def test_a_hook_that_cannot_be_opened_says_why(hook, tmp_path):
    machine = build_machine(tmp_path, {"SOLVENT_NOTICE_HOOK": hook})
    if not hook:
        assert len(load("plain").open_feeds(machine)) == 3
        return
    with pytest.raises(NoticeError, match="PORT:TOKEN"):
        load("plain").open_feeds(machine)
