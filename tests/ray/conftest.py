"""Real clusters on this machine; each in a folder of its own, in which nothing may be left."""

import shutil
import tempfile
from pathlib import Path

import pytest

from elastic.data.kjv import read_chapters
from elastic.data.prepare import prepare
from tests.ray._nodes import Nodes
from tests.ray._traces import assert_nothing_left, wait_until

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The first hundred chapters of the King James Bible, as token shards."""
    folder = tmp_path_factory.mktemp("kjv")
    for number, chapter in enumerate(read_chapters()[:100]):
        (folder / f"{number}.txt").write_text(chapter)
    prepare([folder], folder / "data", vocab_size=512)
    return folder / "data"


@pytest.fixture(scope="module")
def nodes():
    """Three nodes that the tests of a module share."""
    shared_memory = set(SHARED_MEMORY.iterdir())
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    nodes = Nodes(folder, num_nodes=3)
    try:
        yield nodes
    finally:
        nodes.close()
        assert_nothing_left(folder)
        # other runs on this machine name theirs for a moment only
        wait_until(lambda: set(SHARED_MEMORY.iterdir()) <= shared_memory, timeout_s=5, what="nothing in /dev/shm")
        shutil.rmtree(folder)
