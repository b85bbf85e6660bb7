"""What each process of a run imports: `lint-imports` reads the code, this runs it."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "wandb", "cluster"}


def get_imported(code):
    """Return which of the heavy packages a fresh interpreter has imported after running some code."""
    code += f"\nimport sys; print(*({HEAVY!r} & set(sys.modules)))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


IMPORT_ALL_OF_ELASTIC = """
import importlib, pkgutil, elastic
for module in pkgutil.walk_packages(elastic.__path__, "elastic."):
    if not module.name.startswith("elastic.nn.kernels."):  # Triton is where GPUs are
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        pytest.param("import elastic.training.run", {"torch"}, id="trainer"),
        pytest.param(IMPORT_ALL_OF_ELASTIC, {"torch"}, id="all of elastic"),
        pytest.param("import cluster.runtime.ray.agent", {"cluster", "ray"}, id="what Ray starts"),
        pytest.param("import cluster.runtime.driver", {"cluster", "ray"}, id="driver"),
        pytest.param("import cluster.runtime.node.host", {"cluster"}, id="host of trainers, before it warms up"),
        pytest.param("import cluster.report.page", {"cluster"}, id="report"),
    ],
)
def test_a_process_imports_no_more_than_it_needs(code, allowed):
    assert get_imported(code) == allowed
