"""Names of the folders of hosts."""

from cluster.runtime.node.start_host import find_older, get_host_folder, new_session


def test_the_hosts_of_a_run_s_earlier_sessions_on_the_same_node_are_found_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    earlier, now, other_run = (new_session(run) for run in ("aaaaaaaa", "aaaaaaaa", "bbbbbbbb"))
    folders = [get_host_folder(node, s) for node in ("n" * 56, "m" * 56) for s in (earlier, now, other_run)]
    for folder in folders:
        folder.mkdir()
    assert len(set(folders)) == len(folders)
    assert find_older(get_host_folder("n" * 56, now), now) == [get_host_folder("n" * 56, earlier)]
