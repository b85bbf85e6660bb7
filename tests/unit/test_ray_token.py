"""The token of a Ray cluster: where it is found, when it is shown, and what a refusal means."""

import pytest

from cluster.runtime.ray.ray_token import explain_refusal, read_token
from elastic.errors import ConfigError


@pytest.fixture
def home(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("abc\n")
    return {"HOME": str(tmp_path)}


def test_a_file_that_is_named_and_cannot_be_read_is_told(home):
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH=/none cannot be read"):
        read_token({**home, "RAY_AUTH_TOKEN_PATH": "/none"})


def test_a_refusal_names_what_was_shown_and_what_to_do(home, tmp_path):
    elsewhere = {"HOME": str(tmp_path / "elsewhere")}
    for env, words in (
        (home, f"and the one in {home['HOME']}/.ray/auth_token is another"),
        ({**home, "RAY_AUTH_TOKEN": "x"}, "and the one in RAY_AUTH_TOKEN is another"),
        (elsewhere, "RAY_ADDRESS=h:1: this cluster lets nobody in without its token, and there is none here"),
        ({**elsewhere, "RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token, but there is no token here"),
        ({**home, "RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled keeps Ray from showing one"),
    ):
        text = str(explain_refusal("h:1", env))
        assert words in text
        assert "\n" not in text
        assert "Copy the head's ~/.ray/auth_token to " in text
        assert read_token(home) not in text.replace("auth_token", "")
