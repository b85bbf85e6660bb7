"""A user without a home, as a container that runs under any user id has one; in processes of their own."""

import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = 61234
"""A user id without a line in /etc/passwd."""
LOOK = """
import getpass, json, os, sys
from elastic.paths import ensure_home
from elastic.errors import ConfigError
if len(sys.argv) > 1:
    os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
try:
    said = ensure_home(os.environ)
except ConfigError as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
print(json.dumps({"said": said, "home": os.path.expanduser("~"), "user": getpass.getuser()}))
"""


def look(tmp_path, *arguments, **env):
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", LOOK, *map(str, arguments)]
    out = subprocess.run(
        command, env={**clean, "TMPDIR": str(tmp_path), **env}, cwd=ROOT, capture_output=True, check=True, text=True
    )
    return json.loads(out.stdout)


@pytest.fixture
def temporary(tmp_path):
    """A folder for temporary files that anybody may use, as /tmp is."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    return folder


def test_a_home_that_can_be_written_is_left_as_it_is(tmp_path):
    found = look(tmp_path, HOME=str(tmp_path))
    assert (found["said"], found["home"]) == ("", str(tmp_path))


def test_without_home_the_one_of_the_password_file_counts(tmp_path):
    assert look(tmp_path)["home"] == pwd.getpwuid(os.getuid()).pw_dir


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@as_root
@pytest.mark.parametrize("home", [None, "/", "/nonexistent"])
def test_a_user_without_a_home_gets_a_private_one_and_is_told(temporary, home):
    found = look(temporary, NOBODY, **({"HOME": home} if home else {}))
    made = temporary / f"solvent-home-{NOBODY}"
    assert found["home"] == str(made)
    assert found["said"].startswith("HOME is not set" if home is None else f"HOME={home} cannot be written")
    assert found["user"] == f"user{NOBODY}"
    assert (made.stat().st_uid, stat.S_IMODE(made.stat().st_mode)) == (NOBODY, 0o700)
    assert look(temporary, NOBODY)["home"] == str(made)  # the same again: what is there is found again


@as_root
@pytest.mark.parametrize("kind", ["link", "somebody else's", "open"])
def test_a_home_that_somebody_else_has_laid_there_is_refused(temporary, kind):
    made = temporary / f"solvent-home-{NOBODY}"
    if kind == "link":
        made.symlink_to(temporary)
    else:
        made.mkdir()
        if kind == "open":
            os.chown(made, NOBODY, NOBODY)
            made.chmod(0o777)
    assert "is not this user's alone. Set HOME to" in look(temporary, NOBODY, HOME="/")["refused"]


def test_a_command_says_what_stands_in_for_the_home_in_one_line(tmp_path):
    command = [sys.executable, "-c", "from cluster.cli import enter; enter()", "report", "nothing"]
    env = {**os.environ, "HOME": "/nonexistent", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first.startswith("solvent: HOME=/nonexistent cannot be written")
    assert len(rest) == 1 and "Traceback" not in done.stderr
