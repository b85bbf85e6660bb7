"""What every file of `cluster/cli` must keep to."""

import pytest

from cluster.cli import build_parser, load_verb
from elastic.plugins import get_names


@pytest.mark.parametrize("name", get_names("cluster.cli"))
def test_a_verb_has_a_one_line_summary_and_its_own_help(name, capsys):
    summary = (load_verb(name).__doc__ or "").partition("\n")[0]
    assert summary.endswith(".") and len(summary) < 100
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args([name, "--help"])
    assert summary.split()[0] in capsys.readouterr().out
