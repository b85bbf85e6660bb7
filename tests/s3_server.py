"""A real S3 server (moto) on this machine, and a bucket in it."""

import pytest


@pytest.fixture(scope="session")
def s3_endpoint():
    """Return ``http://host:port`` of the server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_endpoint, monkeypatch):
    """Let this process and its children find the server the way users do; return its endpoint."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", s3_endpoint),
    ):
        monkeypatch.setenv(name, value)
    return s3_endpoint


@pytest.fixture
def s3_url(s3_environment, request):
    """Return a URL of a bucket of this test's own."""
    import boto3

    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    client = boto3.client("s3", endpoint_url=s3_environment, region_name="us-east-1")
    client.create_bucket(Bucket=name)
    return f"s3://{name}/runs"
