"""What every file of `cluster/kube/profiles` must keep to, judged by others' schemas, and the examples in k8s/."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.kube.render import get_profile_names

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
KUBERNETES = [name for name in get_profile_names() if name not in ("skypilot", "dstack")]
VARIANTS = {
    "plain": [],
    "all options": [
        *("--set", "secret=keys", "--set", "auth_secret=ray-token", "--set", "service_account=trainer"),
        *("--set", "monitor=true", "--set", "gpu=some-gpu"),
    ],
    "kueue": ["--set", "queue=team"],
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def render(capsys, profile, *words):
    config = ["configs/1.5b-8x24gb-spot.yaml", "storage=s3://bucket/runs", "data.path=/mnt/solvent/data"]
    options = ["--set", "image=registry.example.com/solvent:0.1.0", "--set", "claim=data"]
    assert main(["render", *config, "--profile", profile, *options, *words]) == 0
    return capsys.readouterr().out


def judge(path):
    """Apply KubeRay's own schemas, which lie beside this repository where it is developed; return what they say."""
    tool = SHARED / "tools" / "validate_kuberay.py"
    if not tool.is_file():
        pytest.skip(f"{tool} is not here: KubeRay's own schemas are not part of the repository")
    return subprocess.run([sys.executable, tool, path], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("profile", get_profile_names())
def test_the_example_is_what_its_first_line_renders(capsys, profile):
    example = (ROOT / "k8s" / f"{profile}.yaml").read_text()
    command = shlex.split(example.partition("\n")[0].removeprefix("# "))
    assert command[0] == "solvent" and profile in command
    assert main(command[1:]) == 0
    assert capsys.readouterr().out == example, f"render k8s/{profile}.yaml again: {shlex.join(command)}"


def test_there_is_an_example_of_every_profile_and_of_nothing_else():
    assert sorted(path.stem for path in (ROOT / "k8s").glob("*.yaml")) == sorted(get_profile_names())


def test_kuberay_would_take_all_of_it(capsys, tmp_path):
    path = tmp_path / "all.yaml"
    streams = [render(capsys, profile, *words) for profile in KUBERNETES for words in VARIANTS.values()]
    path.write_text("".join(streams))
    assert f"{len(streams)} ray docs, 0 bad" in judge(path)


def test_the_judge_refuses_what_is_wrong(capsys, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(render(capsys, "generic").replace("maxReplicas:", "maxReplica:"))
    assert "1 ray docs, 1 bad" in judge(path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("profile", KUBERNETES)
def test_kubernetes_would_take_what_stands_beside_the_job_and_its_pods(capsys, profile, variant):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all(render(capsys, profile, *VARIANTS[variant])))
    job = documents[-1]["spec"]
    cluster = job["rayClusterSpec"]
    templates = [job["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]
    core = [document for document in documents if document["kind"] not in ("RayJob", "PodMonitor")]
    assert len(core) == 5
    for document in [*core, *pods]:
        kubernetes_validate.validate(document, "1.32", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pods[0], "speck": 1}, "1.32", strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("profile", KUBERNETES)
def test_kustomize_builds_from_base_and_overlay_what_render_prints(capsys, tmp_path, profile, variant):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed, and kustomize comes with it")
    expected = yaml.safe_load_all(render(capsys, profile, *VARIANTS[variant]))
    render(capsys, profile, *VARIANTS[variant], "--kustomize", str(tmp_path))
    built = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "overlays" / profile)], check=True, capture_output=True, text=True
    )

    def by_name(documents):
        return {(document["kind"], document["metadata"]["name"]): document for document in documents}

    assert by_name(yaml.safe_load_all(built.stdout)) == by_name(expected)


@pytest.mark.parametrize("profile", ["skypilot", "dstack"])
def test_the_script_of_a_task_is_one_that_bash_can_read(capsys, profile):
    (task,) = yaml.safe_load_all(render(capsys, profile, "--set", "gpu=L4"))
    script = task["run"] if profile == "skypilot" else task["commands"][0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("profile", get_profile_names())
def test_nothing_listens_on_all_addresses_by_our_doing(capsys, profile):
    assert "0.0.0.0" not in render(capsys, profile, "--set", "gpu=L4")
