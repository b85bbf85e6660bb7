"""Runs whose storage is an S3 server that fails now and then."""

import pytest

from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.flaky_proxy import open_proxy
from tests.ray._nodes import open_nodes
from tests.ray._runs import Run

__all__ = ["BUCKET", "StoredRun", "nodes", "requests"]  # two are fixtures

BUCKET = "solvent-ray"
FAILING = 0.01
"""The share of requests that something happens to."""


class StoredRun(Run):
    """A run in the bucket; while it trains, its rows are in the spool of the coordinator, on this machine."""

    def __init__(self, nodes, data, folder, **overrides):
        super().__init__(nodes, data, folder, **overrides)
        self.overrides["storage"] = f"s3://{BUCKET}/runs"
        self.url = f"{self.overrides['storage']}/{self.overrides['run']}"

    def find_spools(self):
        return list(self.nodes.folder.glob("solvent-spool-*"))

    def rows(self):
        return [row for spool in self.find_spools() for row in read_rows(RunDir(spool).metrics)]

    def get_committed_steps(self):
        keys = open_storage(self.url).list("checkpoints/")
        return sorted(int(key.split("/")[1][5:]) for key in keys if key.endswith("COMMITTED"))

    def fetch(self, folder):
        """Copy everything out of the bucket."""
        storage = open_storage(self.url)
        for key in storage.list():
            path = folder / self.overrides["run"] / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read(key))
        return RunDir(folder / self.overrides["run"])


@pytest.fixture(scope="module")
def requests(s3_endpoint):
    """Set the environment of nodes and drivers: a bucket behind a proxy; return what was done to requests."""
    import boto3

    with pytest.MonkeyPatch.context() as patch, open_proxy(s3_endpoint, rate=FAILING, seed=1) as (url, done):
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", url),
        ):
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield done


@pytest.fixture(scope="module")
def nodes(requests):
    with open_nodes(3) as nodes:
        yield nodes
