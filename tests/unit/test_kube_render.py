"""What `solvent render` writes for any run that it accepts."""

import dataclasses
import re
import string

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kube.kustomize import find_changes
from cluster.kube.names import MOST_CHARS, get_job_name
from cluster.kube.options import Options, parse_options
from cluster.kube.override import apply_overrides
from cluster.kube.render import get_profile_names, is_kubernetes, render
from cluster.kube.rules import check_stream, parse_quantity
from cluster.kube.sizing import plan_sizes
from cluster.kube.text import dump_documents
from cluster.notices import get_drain_s
from elastic.config import ClusterConfig, CostConfig, DataConfig, RunConfig, TrainConfig, WandbConfig
from elastic.config_load import load
from elastic.errors import ConfigError
from elastic.models.llama import Config as ModelConfig

KUBERNETES = ["aks-spot", "eks-spot", "generic", "gke-spot"]
DATA = DataConfig(path="/mnt/solvent/data")
IMAGE = "registry.example.com/solvent:0.1.0"
LARGE = ModelConfig(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336, vocab_size=128256)


def make_config(*, min_workers=2, max_workers=4, gpus=1, **fields):
    fields = {"run": "my-run", "storage": "s3://bucket/runs", "data": DATA, **fields}
    cluster = ClusterConfig(min_workers=min_workers, max_workers=max_workers, gpus_per_worker=gpus)
    return RunConfig(cluster=cluster, train=TrainConfig(global_batch=max(32, max_workers)), **fields)


def make_options(**fields):
    return Options(**{"image": IMAGE, "claim": "data", "gpu": "H100", **fields})


def get_job(documents):
    return next(document for document in documents if document["kind"] == "RayJob")


run_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}", fullmatch=True)


@st.composite
def runs(draw):
    """A configuration and options that fit each other."""
    least = draw(st.integers(1, 40))
    gpus = draw(st.sampled_from([0, 1]))
    model = ModelConfig(
        dim=64 * draw(st.integers(1, 128)), num_layers=draw(st.integers(1, 80)), vocab_size=draw(st.integers(1, 200000))
    )
    config = make_config(
        run=draw(run_names),
        min_workers=least,
        max_workers=least + draw(st.integers(0, 600)),
        gpus=gpus,
        strategy=draw(st.sampled_from(["fsdp2", "ddp", "hsdp"])),
        storage=draw(st.sampled_from(["s3://bucket/runs", "gs://b", "az://b/c", "/mnt/solvent/runs"])),
        model=model,
        wandb=WandbConfig(project=draw(st.text(string.printable, max_size=20))),
    )
    kubernetes = draw(st.booleans())
    name = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
    options = make_options(
        gpus_per_node=draw(st.integers(1, 8)) if gpus else 1,
        queue=draw(st.one_of(st.just(""), name)) if kubernetes else "",
        secret=draw(st.one_of(st.just(""), name)) if kubernetes else "",
        service_account=draw(st.one_of(st.just(""), name)) if kubernetes else "",
        auth_secret=draw(st.one_of(st.just(""), name)) if kubernetes else "",
        monitor=draw(st.booleans()) and kubernetes,
        backoff_limit=draw(st.integers(0, 1000)),
        active_deadline_s=draw(st.integers(1, 2**31 - 1)),
        on_demand_nodes=draw(st.integers(-1, 5)),
    )
    profile = draw(st.sampled_from(KUBERNETES if kubernetes else ["skypilot", "dstack"]))
    return config, profile, options


@settings(max_examples=25)
@given(runs())
def test_whatever_is_rendered_is_valid_and_the_same_each_time(run):
    config, profile, options = run
    documents = render(config, profile, options)
    assert documents == render(config, profile, options)
    if is_kubernetes(documents):
        check_stream(documents)
        assert all(len(document["metadata"]["name"]) <= 47 for document in documents)
    text = dump_documents(documents)
    assert list(yaml.load_all(text, yaml.CSafeLoader)) == documents


@settings(max_examples=15)
@given(runs())
def test_the_run_that_starts_in_the_pod_is_the_run_that_was_configured(tmp_path_factory, run):
    config, _, options = run
    options = dataclasses.replace(options, service_account="", queue="", secret="", auth_secret="", monitor=False)
    documents = render(config, "generic", options)
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(next(d for d in documents if d["kind"] == "ConfigMap")["data"]["config.yaml"], newline="")
    assert load(path) == config


@given(run_names, run_names)
def test_job_names_are_legal_short_and_differ_where_runs_do(one, other):
    name = get_job_name(one)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= MOST_CHARS
    assert (name == get_job_name(other)) == (one == other)


@given(st.integers(4, 3600))
def test_a_node_is_clear_before_its_grace_period_ends(grace_s):
    assert 0 < get_drain_s(grace_s) <= grace_s - 2


TEXTS = st.one_of(
    st.text(), st.sampled_from(["no", "y", "1e3", "0o7", "12:30", "0.5", "~", "null", "- a", "a: b", "#"])
)


@given(st.dictionaries(TEXTS, TEXTS))
def test_text_stays_text_in_yaml(fields):
    text = dump_documents([fields])
    assert list(yaml.safe_load_all(text)) == [fields]
    for line in text.splitlines()[1:]:  # what other readers take for a number or a truth value is in quotes
        plain = line.partition(": ")[2]
        assert plain.lower() not in ("y", "n", "yes", "no", "on", "off", "1e3", "0o7", "12:30")


values = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text("a/~", max_size=3), inner, max_size=4)
    ),
)


@given(st.dictionaries(st.sampled_from("abc"), values), st.dictionaries(st.sampled_from("abc"), values))
def test_the_patch_of_an_overlay_makes_one_document_into_the_other(old, new):
    jsonpatch = pytest.importorskip("jsonpatch")
    assert jsonpatch.apply_patch(old, list(find_changes(old, new))) == new


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(tied_head=False, num_kv_heads=2, qkv_bias=True),
        ModelConfig(head_dim=32, qk_norm=True),
    ],
)
def test_parameters_are_counted_as_the_model_has_them(model):
    from elastic.models.llama import build

    with torch.device("meta"):
        assert model.num_params == sum(param.numel() for param in build(model).parameters())


def test_memory_of_a_node_counts_the_snapshots_that_it_holds():
    # 3 snapshots of a shard (half of 12 bytes per parameter) for each of 2 GPUs; 6 GiB a trainer and 4 a node.
    model = LARGE
    config = make_config(model=model, min_workers=2, max_workers=2)
    sizes = plan_sizes(config, make_options(gpus_per_node=2))
    snapshots_gib = 2 * 3 * model.num_params * 12 / 2 / 2**30
    assert snapshots_gib < sizes.memory_gib - sizes.shm_mib / 1024 < snapshots_gib + 2 * 6 + 4 + 2
    assert plan_sizes(config, make_options(gpus_per_node=2, memory_gib_per_node=100)).memory_gib == 100


def test_memory_of_a_node_is_that_of_the_worst_world():
    # One GPU a node: alone 3 of its own shard, the whole state; of two 3 + 2 halves; of three 5 thirds.
    config = make_config(model=LARGE, min_workers=1, max_workers=3)
    gib = {sizes: plan_sizes(config, make_options(gpus_per_node=sizes)).memory_gib for sizes in (1, 2)}
    state_gib = LARGE.num_params * 12 / 2**30
    assert gib[1] == pytest.approx(3 * state_gib + 4 + 6, abs=2.1)  # and /dev/shm, rounded up
    assert gib[2] == pytest.approx(2 * 5 / 3 * state_gib + 4 + 2 * 6, abs=2.6)  # of three, two of which are here


def test_a_node_without_gpus_holds_of_frozen_weights_and_adapters_what_trains_them():
    # 4 bytes of each weight that is frozen, and what adapters take: less than one state of 12 bytes a weight.
    full = make_config(model=LARGE, min_workers=1, max_workers=1, gpus=0)
    lora = dataclasses.replace(full, tune="lora")
    full_gib, lora_gib = (plan_sizes(config, make_options()).memory_gib for config in (full, lora))
    assert full_gib > (3 * 12 + 16) * LARGE.num_params / 2**30
    assert 4 * LARGE.num_params / 2**30 < lora_gib < 12 * LARGE.num_params / 2**30


def test_memory_of_a_node_counts_the_spare_trainers_of_a_run_that_is_compiled():
    config, options = make_config(min_workers=2, max_workers=2), make_options(gpus_per_node=2)
    compiled = dataclasses.replace(config, compile=True)
    without = dataclasses.replace(compiled, cluster=dataclasses.replace(config.cluster, spare_trainers=False))
    memory_gib = plan_sizes(config, options).memory_gib
    assert plan_sizes(compiled, options).memory_gib == memory_gib + 2 * 3
    assert plan_sizes(without, options).memory_gib == memory_gib


@pytest.mark.parametrize(
    ("profile", "grace_s"), [("gke-spot", 15), ("aks-spot", 25), ("generic", 30), ("eks-spot", 120)]
)
def test_a_worker_has_the_clouds_grace_period_and_tells_its_node_watch(profile, grace_s):
    groups = get_job(render(make_config(), profile, make_options()))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["spot", "on-demand"]
    assert groups[0]["priority"] > groups[1]["priority"]
    for group in groups:
        pod = group["template"]["spec"]
        env = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        assert (pod["terminationGracePeriodSeconds"], env["SOLVENT_GRACE_S"]) == (grace_s, str(grace_s))
        drain_s = env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2].startswith(f"echo {drain_s} ")
        assert pod["automountServiceAccountToken"] is False


def test_the_notice_that_the_hook_writes_is_one_that_the_node_watch_reads(tmp_path):
    import subprocess

    pod = get_job(render(make_config(), "gke-spot", make_options()))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    command = pod["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    path = tmp_path / "notice"
    subprocess.run(command, env={"SOLVENT_NOTICE_FILE": str(path)}, check=True)
    assert path.read_text() == "13\n"


def test_groups_hold_the_workers_that_the_run_wants_whole_nodes_at_a_time():
    documents = render(make_config(min_workers=3, max_workers=17), "generic", make_options(gpus_per_node=4))
    groups = get_job(documents)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["maxReplicas"] for group in groups] == [10, 1]  # 5 nodes of 4 GPUs, and as many that are leaving
    assert groups[0]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_workers_get_a_token_only_to_watch_their_nodes():
    for watches in (True, False):
        options = make_options(node_notices=watches, service_account="trainer")
        spec = get_job(render(make_config(), "generic", options))["spec"]
        pod = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
        assert pod["automountServiceAccountToken"] == watches
        assert ("NODE_NAME" in {variable["name"] for variable in pod["containers"][0]["env"]}) == watches
        assert not spec["submitterPodTemplate"]["spec"]["automountServiceAccountToken"]


@pytest.mark.parametrize(("settings", "most"), [({}, 8), ({"spot_nodes": 4}, 4), ({"queue": "team"}, 4)])
def test_a_node_under_notice_has_room_beside_it_for_its_replacement_unless_nodes_are_limited(settings, most):
    groups = get_job(render(make_config(), "generic", make_options(**settings)))["spec"]["rayClusterSpec"]
    assert groups["workerGroupSpecs"][0]["maxReplicas"] == most


def test_a_head_whose_driver_is_gone_ends_at_once_and_so_does_its_autoscaler():
    cluster = get_job(render(make_config(), "generic", make_options()))["spec"]["rayClusterSpec"]
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "gcs_server" in script and "kill -9" in script  # of SIGTERM Ray thinks that somebody else sees to the rest
    assert cluster["autoscalerOptions"]["args"][0].startswith("trap 'exit 0' TERM; ")


def test_what_cannot_get_better_is_told_to_the_driver_of_a_job_that_kuberay_tries_again():
    spec = get_job(render(make_config(), "generic", make_options()))["spec"]
    assert spec["entrypoint"].endswith(" --stop-retries") and spec["backoffLimit"] > 0
    # KubeRay applies no deletionRule to a job that was stopped: only this ends its cluster
    assert spec["shutdownAfterJobFinishes"] and "deletionStrategy" not in spec


def test_a_queue_fixes_the_number_of_nodes_and_turns_the_autoscaler_off():
    spec = get_job(render(make_config(), "eks-spot", make_options(queue="team")))["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert not spec["rayClusterSpec"]["enableInTreeAutoscaling"]
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (4, 4, 4)


def test_an_override_changes_its_group_only_and_leaves_the_rest():
    before = render(make_config(), "gke-spot", make_options())
    change = yaml.safe_load("""
        kind: RayJob
        spec:
          rayClusterSpec:
            workerGroupSpecs:
              - groupName: on-demand
                maxReplicas: 7
                template:
                  spec:
                    containers:
                      - name: ray-worker
                        env: [{name: NCCL_DEBUG, value: INFO}]
    """)
    after = render(make_config(), "gke-spot", make_options(), fragments=[change])
    (spot, on_demand) = get_job(after)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (old_spot, old_on_demand) = get_job(before)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert spot == old_spot
    assert on_demand["maxReplicas"] == 7
    names = [env["name"] for env in on_demand["template"]["spec"]["containers"][0]["env"]]
    old_names = [env["name"] for env in old_on_demand["template"]["spec"]["containers"][0]["env"]]
    assert names == [*old_names, "NCCL_DEBUG"]


@settings(max_examples=15)
@given(st.data())
def test_an_empty_override_changes_nothing_and_one_that_repeats_changes_nothing(data):
    documents = render(make_config(), data.draw(st.sampled_from(KUBERNETES)), make_options())
    document = data.draw(st.sampled_from(documents))
    fragment = {"kind": document["kind"], "metadata": {"name": document["metadata"]["name"]}}
    assert apply_overrides(documents, [fragment]) == documents
    assert apply_overrides(documents, [document]) == documents


SECRET = "hunter2-very-secret"


@pytest.mark.parametrize("profile", get_profile_names())
@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"storage": f"s3://user:{SECRET}@bucket/runs"}, []),
        ({"storage": f"s3://bucket/runs?secret_access_key={SECRET}"}, []),
        ({"storage": f"az://bucket/runs?sig={SECRET}"}, []),
        ({}, [f"secret_env=WANDB_API_KEY={SECRET}"]),
        ({}, [f"claim=s3://user:{SECRET}@bucket"]),
        ({}, [f"image=user:{SECRET}@registry.example.com/solvent:1"]),
    ],
    ids=["login", "query", "signature", "value of a variable", "claim", "image"],
)
def test_a_secret_is_refused_and_not_repeated(profile, fields, settings):
    with pytest.raises(ConfigError) as error:
        render(make_config(**fields), profile, parse_options([f"image={IMAGE}", "claim=data", "gpu=H100", *settings]))
    assert SECRET not in str(error.value) or "image" in str(error.value)


def test_secrets_are_named_and_never_written(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    config = make_config(wandb=WandbConfig(mode="online"))
    for profile in get_profile_names():
        named = {"secret": "keys"} if profile in KUBERNETES else {"secret_env": "WANDB_API_KEY"}
        text = dump_documents(render(config, profile, make_options(**named)))
        assert SECRET not in text
        assert "keys" in text or "WANDB_API_KEY" in text


def test_prices_travel_with_the_run():
    config = make_config(cost=CostConfig(price_file="prices.yaml"))
    config_map = next(d for d in render(config, "generic", make_options(), prices="a: 1\n") if d["kind"] == "ConfigMap")
    assert config_map["data"]["prices.yaml"] == "a: 1\n"
    assert "price_file: /etc/solvent/prices.yaml" in config_map["data"]["config.yaml"]


def test_quantities_mean_what_kubernetes_means():
    assert [parse_quantity(text) for text in ("1", "500m", "2Gi", "3G", "1.5Ki")] == [1, 0.5, 2 * 2**30, 3e9, 1536]


def test_the_image_is_asked_for_the_ray_that_we_checked():
    from importlib.metadata import version

    from cluster.kube.rayjob import RAY_VERSION

    assert version("ray") == RAY_VERSION
