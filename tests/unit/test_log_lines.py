"""What of a job's log is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.log_lines import LogLines

RAYS = """\
Traceback (most recent call last):
  File "/home/solvent/venv/lib/python3.11/site-packages/aiohttp/connector.py", line 1115, in _wrap_create_connection
    sock = await aiohappyeyeballs.start_connection(
ConnectionRefusedError: [Errno 111] Connect call failed ('10.0.0.7', 8265)

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/usr/local/bin/ray", line 8, in <module>
    sys.exit(main())
  File "/usr/local/lib/python3.11/site-packages/ray/scripts/scripts.py", line 2870, in main
    return cli()
  File "/usr/local/lib/python3.11/site-packages/ray/dashboard/modules/job/cli.py", line 559, in logs
    get_or_create_event_loop().run_until_complete(_tail_logs(client, job_id))
aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 10.0.0.7:8265""".splitlines()
OURS = """\
Traceback (most recent call last):
  File "/usr/local/lib/python3.11/site-packages/ray/dashboard/modules/job/cli.py", line 559, in logs
    pass
  File "/usr/local/lib/python3.11/site-packages/cluster/runtime/driver.py", line 99, in train
    raise ValueError("a bug of ours")
ValueError: a bug of ours""".splitlines()


def show(lines, *, colors="strip"):
    log = LogLines(colors=colors)
    return [shown for line in lines for shown in log.take(line)] + log.flush()


def test_a_traceback_of_rays_own_client_is_one_line_and_what_follows_is_shown():
    shown = show(["step 1", *RAYS, "step 2"])
    assert (shown[0], shown[-1], len(shown)) == ("step 1", "step 2", 3)
    assert "ClientConnectorError: Cannot connect to host 10.0.0.7:8265" in shown[1]


@pytest.mark.parametrize("lines", [OURS, [*RAYS[:4], "step 2"], RAYS[:3]], ids=["ours", "a library's", "torn"])
def test_a_traceback_of_anybody_else_is_shown_whole(lines):
    assert show(["step 1", *lines]) == ["step 1", *lines]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[32mJob 'mine-x7' submitted successfully\x1b[39m", ["Job 'mine-x7' submitted successfully"]),
        ("\x1b[1;38;5;9mbold\x1b[0m and \x1b]0;title\x07plain", ["bold and plain"]),
        (" 10%|#         | 1/10\r 20%|##        | 2/10\r100%|##########| 10/10", ["100%|##########| 10/10"]),
        ("step 1\r", ["step 1"]),
        ("\x1b[2K\x1b[1A", []),
        ("", [""]),
    ],
)
def test_colors_and_bars_are_for_terminals(line, shown):
    assert show([line]) == shown


def test_a_terminal_gets_its_colors():
    assert show(["\x1b[32mgreen\x1b[39m"], colors="keep") == ["\x1b[32mgreen\x1b[39m"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]))), st.sampled_from(["keep", "strip"]))
def test_plain_lines_are_shown_as_they_are(lines, colors):
    assert show(lines, colors=colors) == lines
