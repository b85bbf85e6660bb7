"""Settings that all tests share."""

from hypothesis import settings

# A loaded machine is slow, not wrong: time limits are pytest-timeout's business.
settings.register_profile("solvent", deadline=None)
settings.load_profile("solvent")

from tests.s3_server import s3_endpoint, s3_environment, s3_url  # noqa: E402, F401 (fixtures)
