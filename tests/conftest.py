"""Settings that all tests share."""

import signal

from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts us in the background ignores it for us and for all that we start, and tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine is slow, not wrong: time limits are pytest-timeout's business. A failure prints how to repeat it.
settings.register_profile("solvent", deadline=None, print_blob=True)
settings.load_profile("solvent")

from tests.s3_server import s3_endpoint, s3_environment, s3_url  # noqa: E402, F401 (fixtures)
from tests.second_try import pytest_configure, pytest_report_header, pytest_runtest_setup  # noqa: E402, F401 (hooks)


def pytest_collection_modifyitems(items):
    """Begin with the clusters, which take longest: of two processes, none is left with them when the other is done."""
    items.sort(key=lambda item: "ray" not in item.path.parts)
