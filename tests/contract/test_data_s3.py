import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from elastic.data.preparation.documents import find_sources
from elastic.data.preparation.prepare import prepare
from elastic.errors import DataError


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    filesystem = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True)
    filesystem.create_dir("texts")
    for name, text in {"in/a.txt": "First.", "in/deep/b.txt": "Second.", "in/_SUCCESS": ""}.items():
        with filesystem.open_output_stream(f"texts/{name}") as file:
            file.write(text.encode())
    return "s3://texts"


def test_a_folder_in_an_object_store_is_read_like_a_local_one(bucket, tmp_path):
    from_s3 = prepare([f"{bucket}/in"], tmp_path / "s3", vocab_size=260, val_fraction=0)
    for name, text in {"in/a.txt": "First.", "in/deep/b.txt": "Second."}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert from_s3 == prepare([tmp_path / "in"], tmp_path / "local", vocab_size=260, val_fraction=0)


@pytest.mark.parametrize("pattern", ["in/*.txt", "in/a.txt", "*/a.txt"])
def test_a_glob_in_an_object_store_does_not_cross_folders(bucket, pattern):
    assert [source.name for source in find_sources([f"{bucket}/{pattern}"], text_key="text")] == ["texts/in/a.txt"]


def test_the_endpoint_may_be_in_the_uri(bucket, endpoint, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (source,) = find_sources([f"{bucket}/in/a.txt?endpoint_override={endpoint}&scheme=http"], text_key="text")
    assert list(source.read()) == ["First."]


@pytest.mark.parametrize("name", ["texts/nothing", "no-such-bucket/in/*.txt"])
def test_what_is_not_in_the_store_is_named(bucket, name):
    with pytest.raises(DataError, match="does not exist"):
        find_sources([f"s3://{name}"], text_key="text")


def test_a_store_that_does_not_answer_is_an_error_of_the_user(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(DataError, match="cannot be read"):
        find_sources(["s3://texts/in"], text_key="text")
