"""What `solvent doctor` thinks of machines that are not this one, and how it says so."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import doctor
from cluster.cli import main
from cluster.providers import Evidence, Machine, fetch
from cluster.runtime.node.start_host import SUBREAPER
from elastic.checkpoint.durable.storage_errors import estimate_checkpoint_bytes
from elastic.config_load import load
from elastic.errors import ConfigError
from tests.contract._clouds import Aws, Gcp

CONFIGS = Path(__file__).parents[2] / "configs"


def test_memory_for_snapshots_is_judged_for_the_ranks_that_this_node_will_have():
    """1.5 B on 8 nodes of a GPU: a shard of 1.55 GB each, three of one's own and two of a peer's."""
    config = load(CONFIGS / "1.5b-8x24gb-spot.yaml", ["cluster.max_workers=8", "checkpoint.memory=peer"])

    def check(gib, **values):
        return doctor.check_snapshots(replace(config, **values), 1, int(gib * 2**30))

    shard_gib = estimate_checkpoint_bytes(config.model.num_params) / 8 / 2**30
    assert check(5 * shard_gib + 1.1).status == "ok"
    less = check(4 * shard_gib + 1.1)
    assert (less.status, "so 4 are kept: snapshots come less often" in less.text) == ("warn", True)
    assert "a lost node falls back on the storage" in check(2 * shard_gib + 1.1).text
    assert "a lost trainer may" in check(1 * shard_gib + 1.1).text
    assert "none is kept" in check(0.5).text
    off = replace(config.checkpoint, memory="off")
    assert check(0.1, checkpoint=off).status == "ok"
    assert doctor.check_snapshots(config, 1, None).status == "ok"


def test_a_node_of_eight_gpus_keeps_what_eight_ranks_have_and_no_copies_of_its_own():
    config = load(CONFIGS / "8b-8xh100-spot.yaml", ["cluster.max_workers=8"])
    assert re.match(
        r"(\S+) GiB for 8 of 8 rank\(s\), 3 shards of (\S+) GiB each", doctor.check_snapshots(config, 8, 2**45).text
    )


def test_every_provider_that_is_here_is_named_with_its_evidence():
    evidence = {
        "gcp": Evidence(is_here=True, why="the firmware says so"),
        "kubernetes": Evidence(is_here=True, why="a pod"),
        "aws": Evidence(is_here=False, why="no"),
        "plain": Evidence(is_here=True, why="always"),
    }
    checks = doctor.check_providers(evidence)
    assert [(c.name, c.status, c.text) for c in checks] == [
        ("provider gcp", "ok", "the firmware says so"),
        ("provider kubernetes", "ok", "a pod"),
    ]
    (nobody,) = doctor.check_providers({name: evidence[name] for name in ("aws", "plain")})
    assert (nobody.status, "aws: no" in nobody.text) == ("warn", True)


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")]
)
def test_python_is_one_of_three(version, status):
    assert doctor.check_python(version).status == status


def test_versions_are_judged_by_what_the_distribution_requires():
    required = ["torch>=2.11", "ray[default,train]<2.61,>=2.60", "wandb>=0.31; extra == 'x'"]
    installed = {"torch": "2.13.0+cpu", "ray": "2.61.0", "wandb": "0.1"}
    checks = {c.name: c for c in doctor.check_versions(required, installed.get)}
    assert {name: checks[name].status for name in installed} == {"torch": "ok", "ray": "fail", "wandb": "ok"}
    assert "pip install 'ray<2.61,>=2.60'" in checks["ray"].fix
    assert (checks["pyarrow"].status, checks["pyarrow"].text) == ("fail", "not installed")


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        ('{"gpus": [["H100", 85899345920]], "cuda": "13.0"}', "ok", "H100 (80 GiB); CUDA 13.0"),
        ('{"gpus": [], "cuda": null}', "ok", "CPU only"),
        ('{"gpus": [], "cuda": "13.0"}', "warn", "no GPU"),
        ("ImportError: libcudart.so.13", "fail", "libcudart"),
        ("", "fail", "did not start"),
    ],
)
def test_devices_are_those_that_torch_finds(answer, status, text):
    check = doctor.check_devices(answer)
    assert (check.status, text in check.text) == (status, True)


@pytest.mark.parametrize(("free", "status"), [(None, "fail"), (1, "fail"), (10, "warn"), (20, "ok"), (99, "ok")])
def test_space_is_enough_scarce_or_none(free, status):
    assert doctor.check_space("disk", free, warn_bytes=20, fail_bytes=5).status == status


@pytest.mark.parametrize(("limit", "status"), [(256, "fail"), (1024, "warn"), (65536, "ok"), (-1, "ok")])
def test_few_open_files_are_too_few(limit, status):
    assert doctor.check_files(limit).status == status


@pytest.mark.parametrize(
    ("env", "status"),
    [
        ({}, "ok"),
        ({SUBREAPER: "1"}, "fail"),
        ({SUBREAPER: "0"}, "ok"),
        ({"RAY_LOG_TO_STDERR": "1"}, "warn"),
        ({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}, "fail"),
        ({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "soon"}, "fail"),
        ({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "110"}, "ok"),
    ],
)
def test_settings_of_ray_that_break_us_are_found(env, status):
    found = {check.status for check in doctor.check_ray_settings(env, subreaper=SUBREAPER)}
    assert found - {"ok"} == {status} - {"ok"}


@pytest.mark.parametrize(
    ("skew_s", "status"), [(None, "warn"), (1.0, "ok"), (-1.0, "ok"), (3.0, "warn"), (-3.0, "warn")]
)
def test_a_clock_that_differs_by_more_than_rounding_is_told(skew_s, status):
    assert doctor.judge_clock(skew_s).status == status


def build_machine(tmp_path, env):
    return Machine(node="", env=env, fetch=fetch, now_s=time.time, folder=tmp_path, root=tmp_path)


def test_an_endpoint_is_asked_for_notices_and_for_its_time(tmp_path):
    server = Aws()
    machine = build_machine(tmp_path, server.get_env())
    checks = doctor.check_endpoints(machine, ["aws"])
    assert [(c.name, c.status) for c in checks] == [
        ("notices aws (spot/instance-action)", "ok"),
        ("notices aws (events/recommendations/rebalance)", "ok"),
        ("clock", "ok"),
    ]
    server.give(120)
    server.skew_s = -600
    action, _, clock = doctor.check_endpoints(machine, ["aws"])
    assert (action.status, action.text) == ("warn", "spot interruption (terminate)")
    assert clock.status == "warn"
    assert re.fullmatch(r"\+(599|600|601) s against the metadata server", clock.text)
    server.fault = (500, "<html>")
    assert {c.status for c in doctor.check_endpoints(machine, ["aws"])[:2]} == {"fail"}
    server.close()


def test_an_endpoint_that_does_not_answer_fails_and_says_where_it_was_sought(tmp_path):
    server = Gcp()
    env = server.get_env()
    server.close()
    checks = doctor.check_endpoints(build_machine(tmp_path, env), ["gcp"])
    assert [c.status for c in checks] == ["fail", "fail", "warn"]
    assert env["GCE_METADATA_HOST"] in checks[0].text


def test_it_prints_a_line_per_check_no_secret_and_fails_only_for_failures(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_ask_torch", lambda: '{"gpus": [], "cuda": null}')  # it takes seconds
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    monkeypatch.setenv("SOLVENT_NOTICE_HOOK", "8123:87654321secret")
    monkeypatch.delenv(SUBREAPER, raising=False)
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out
    assert "ok    wandb: logged in by WANDB_API_KEY\n" in out
    monkeypatch.setenv(SUBREAPER, "1")
    assert main(["doctor", "--storage", str(tmp_path), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [c["name"] for c in checks if c["status"] == "fail"] == [SUBREAPER]
    assert all(c["fix"] for c in checks if c["status"] != "ok")


def test_a_home_that_was_put_in_place_of_none_is_told():
    assert doctor.check_home({"HOME": "/home/me"}).status == "ok"
    stands_in = doctor.check_home({"HOME": "/tmp/solvent-home-1000"})
    assert (stands_in.status, "/tmp/solvent-home-1000" in stands_in.text) == ("warn", True)


def test_a_token_that_others_can_read_is_told(tmp_path):
    token = tmp_path / "auth_token"
    assert doctor.check_token_file(token) == []
    token.write_text("secret")
    for mode, status in ((0o600, "ok"), (0o644, "warn"), (0o640, "warn")):
        token.chmod(mode)
        (check,) = doctor.check_token_file(token)
        assert (check.status, "secret" in str(check)) == (status, False)


def test_an_address_of_no_head_fails_and_says_why():
    def refuse():
        raise ConfigError("RAY_ADDRESS=x:1: nobody listens there")

    assert doctor.check_ray_address({}, refuse) == []
    (check,) = doctor.check_ray_address({"RAY_ADDRESS": "x:1"}, refuse)
    assert (check.status, check.text) == ("fail", "RAY_ADDRESS=x:1: nobody listens there")
    (check,) = doctor.check_ray_address({"RAY_ADDRESS": "x:1"}, lambda: "x:1")
    assert (check.status, check.text) == ("ok", "a head answers at x:1")


def test_wandb_is_online_by_a_key_or_by_netrc_for_its_server(tmp_path, monkeypatch):
    assert doctor.check_wandb({}, has_netrc=False).status == "warn"
    (tmp_path / ".netrc").write_text("machine wandb.example login user password hidden\n")
    (tmp_path / ".netrc").chmod(0o600)
    for url, has in (("https://wandb.example:8443/x", True), ("https://api.wandb.ai", False)):
        machine = build_machine(tmp_path, {"HOME": str(tmp_path), "WANDB_BASE_URL": url})
        assert doctor._has_netrc(machine) == has
    assert "hidden" not in doctor.check_wandb({}, has_netrc=True).text
