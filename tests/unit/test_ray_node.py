"""How a rented machine starts Ray: what it may listen on, what it is called, and how long it takes its leave."""

import re
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.kube.render import get_profile_names
from cluster.runtime.ray.ray_start import build_env, build_labels, check_private, parse_head, plan_head, plan_worker
from cluster.runtime.ray.ray_token import make_first_token
from elastic.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_head_trains_nothing_and_shows_its_dashboard_to_nobody_else():
    command = plan_head(ip="10.0.0.5", port=6379, dashboard_port=8265, labels={"a": "b"}, ray_args=["--x=1"])
    assert {"--head", "--dashboard-host=127.0.0.1", "--num-cpus=0", "--num-gpus=0", "--block"} <= set(command)
    assert command[-2:] == ["--labels=a=b", "--x=1"]


def test_a_node_offers_what_it_was_told_else_what_ray_finds():
    one = plan_worker(head=("10.0.0.5", 6379), ip="10.0.0.6", cpus=4, gpus=0, labels={}, ray_args=[])
    assert {"--address=10.0.0.5:6379", "--node-ip-address=10.0.0.6", "--num-cpus=4", "--num-gpus=0"} <= set(one)
    other = plan_worker(head=("10.0.0.5", 6379), ip="10.0.0.6", cpus=None, gpus=None, labels={}, ray_args=[])
    assert not [word for word in other if word.startswith(("--num", "--labels"))]


@pytest.mark.parametrize(("grace_s", "drain_s"), [(3, "1"), (5, "3"), (15, "13"), (30, "26"), (120, "105")])
def test_ray_drains_for_what_the_machine_grants_and_no_longer(grace_s, drain_s):
    env = build_env({"PATH": "/bin"}, grace_s=grace_s)
    assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == drain_s
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_health_check_period_ms"] == "1000"
    assert build_env({"RAY_AUTH_MODE": "disabled"}, grace_s=9)["RAY_AUTH_MODE"] == "disabled"


def test_labels_are_what_ray_takes_and_leave_out_what_is_not_known():
    assert build_labels(provider="vast", market="spot", zone="", offer="RTX 4090, 2x (24 GB)") == {
        "solvent-offer": "RTX-4090-2x-24-GB",
        "solvent-provider": "vast",
        "ray.io/market-type": "spot",
    }
    assert build_labels(provider="", market="spot", zone="eu/1", offer="")["ray.io/availability-zone"] == "eu-1"


@pytest.mark.parametrize("host", ["8.8.8.8", "1.1.1.1"])
def test_a_public_address_is_refused(host):
    with pytest.raises(ConfigError, match=r"is a public address .*say --public if a firewall"):
        check_private("--ip", host)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.9", "localhost"])
def test_private_addresses_and_those_of_a_vpn_are_not(host):
    check_private("--ip", host)


@pytest.mark.parametrize(("text", "head"), [("10.0.0.5", ("10.0.0.5", 6379)), ("h.local:7000", ("h.local", 7000))])
def test_the_port_of_a_head_may_be_left_out(text, head):
    assert parse_head(text) == head


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["join", "--head", "http://10.0.0.5:6379"], "--head=http://10.0.0.5:6379 is no address"),
        (["join", "--head", "10.0.0.5:x"], "is no address"),
        (["join", "--head", "8.8.8.8"], "--head=8.8.8.8 is a public address"),
        (["join", "--head", "no-such-host.invalid"], "is no address that is known here"),
        (["join", "--head", "10.0.0.5"], "there is no token here"),
        (["head", "--ip", "8.8.8.8"], "--ip=8.8.8.8 is a public address"),
        (["head", "--ip", "127.0.0.1", "--grace-s", "1"], "must be between 3 and 3600 s"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(tmp_path, monkeypatch, capsys, words, said):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "SOLVENT_GRACE_S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["nodes", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_token_that_is_made_is_long_and_for_its_user_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert main(["nodes", "head", "--ip", "8.8.8.8"]) == 2
    path = tmp_path / ".ray" / "auth_token"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert re.fullmatch(r"[0-9a-f]{64}", path.read_text())
    assert path.read_text() not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "is_made"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "token"}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "x"}, False),
    ],
)
def test_the_token_of_a_cluster_of_our_own_is_there_before_ray_makes_one_that_all_can_read(tmp_path, env, is_made):
    path = tmp_path / ".ray" / "auth_token"
    for _ in range(2):
        make_first_token({"HOME": str(tmp_path), **env})
        assert path.exists() == is_made
    assert not is_made or path.stat().st_mode & 0o777 == 0o600
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    make_first_token({"HOME": str(tmp_path), **env})
    assert path.read_text() == "mine"


def test_nothing_of_ours_says_to_listen_on_all_addresses():
    """What `render` writes is scanned in tests/contract/test_profiles.py, for every one of these."""
    assert get_profile_names()
    folders = [ROOT / name for name in ("elastic", "cluster", "configs", "k8s")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 150
    assert [path for path in files if b"0.0.0.0" in path.read_bytes()] == []
