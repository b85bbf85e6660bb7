"""What the tests of real processes share."""

import pytest

from elastic.data.preparation.prepare import prepare


@pytest.fixture(scope="session")
def bible(tmp_path_factory):
    """The King James Bible with a vocabulary of 300, as token shards."""
    folder = tmp_path_factory.mktemp("bible") / "data"
    prepare(["kjv:"], folder, vocab_size=300)
    return folder
