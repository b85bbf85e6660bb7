"""A faults file: what is understood, and what is refused before anything starts."""

import pytest

from cluster.chaos.faults import Fault, Target, load_faults
from elastic.errors import ConfigError


def load(tmp_path, text, **limits):
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    return load_faults(path, **{"num_steps": 100, "num_nodes": 3, "max_workers": 3, "seed": 7, **limits})


def test_each_kind_of_fault_is_understood(tmp_path):
    text = """
    - {at_step: 40, fault: kill, target: 1}
    - {at_s: 3, fault: agent_kill, target: node2}
    - {at_step: 5, fault: freeze, target: rank0, for_s: 2, scope: node, phase: saving}
    - {at_step: 5, fault: remove, target: 2}
    - {at_step: 5, fault: drain, notice_s: 10, at_world_size: 2}
    - {at_step: 5, fault: term, target: random, grace_s: 1, seed: 3}
    - {at_step: 5, fault: add}
    - {at_step: 5, fault: driver_kill, phase: starting}
    - {at_step: 5, fault: storage_slow, rate: 4}
    - {at_step: 5, fault: storage_full, for_s: 3, rate: 1}
    - {at_step: 5, fault: storage_flaky}
    """
    assert load(tmp_path, text) == [
        Fault(at_step=40, fault="kill", target=Target(by="rank", index=1), seed=7),
        Fault(at_s=3.0, fault="agent_kill", target=Target(by="node", index=2), seed=7),
        Fault(at_step=5, fault="freeze", target=Target(by="rank"), for_s=2.0, scope="node", phase="saving", seed=7),
        Fault(at_step=5, fault="remove", target=Target(by="node", index=2), seed=7),
        Fault(at_step=5, fault="drain", notice_s=10.0, at_world_size=2, seed=7),
        Fault(at_step=5, fault="term", grace_s=1.0, seed=3),
        Fault(at_step=5, fault="add", seed=7),
        Fault(at_step=5, fault="driver_kill", phase="starting", seed=7),
        Fault(at_step=5, fault="storage_slow", rate=4, seed=7),
        Fault(at_step=5, fault="storage_full", for_s=3.0, rate=1, seed=7),
        Fault(at_step=5, fault="storage_flaky", rate=0.1, seed=7),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds NoneType, not a list of faults"),
        ("{at_step: 1, fault: kill}", "holds dict, not a list of faults"),
        ("- kill", "fault 1 is 'kill', not keys and values"),
        ("- {at_step: 1", "is not YAML"),
        ("- {at_step: 1, fault: kil}", "fault='kil' is not known. Did you mean kill?"),
        ("- {at_step: 1}", "fault=None is not known. Known are: kill"),
        ("- {at_step: 1, fault: kill, taget: 1}", "key 'taget' is not one that fault=kill has. Did you mean target?"),
        ("- {at_step: 1, fault: add, target: 1}", "key 'target' is not one that fault=add has"),
        ("- {at_step: 1, fault: kill, notice_s: 1}", "key 'notice_s' is not one that fault=kill has"),
        ("- {fault: add}", "neither at_step nor at_s"),
        ("- {fault: add, at_s: 1, at_step: 1}", "both at_step and at_s"),
        ("- {fault: add, at_step: 1.5}", "at_step=1.5 must be a whole number, 0 or more"),
        ("- {fault: add, at_step: true}", "at_step=True must be a whole number"),
        ("- {fault: add, at_step: -1}", "at_step=-1 must be a whole number"),
        ("- {fault: add, at_step: 100}", "at_step=100 is never followed by another step"),
        ("- {fault: add, at_s: .nan}", "at_s=nan must be a number of seconds"),
        ("- {fault: add, at_s: .inf}", "at_s=inf must be a number of seconds"),
        ("- {fault: drain, at_step: 1, notice_s: soon}", "notice_s='soon' must be a number of seconds"),
        ("- {fault: storage_flaky, at_step: 1, rate: 2}", "rate=2 must be above 0 and at most 1"),
        ("- {fault: storage_slow, at_step: 1, rate: 0}", "rate=0 must be above 0 and finite: it is MiB/s"),
        ("- {fault: kill, at_step: 1, phase: now}", "phase='now' is not known. Known are: training"),
        ("- {fault: freeze, at_step: 1, scope: nodes}", "scope='nodes' is not known. Did you mean node?"),
        ("- {fault: kill, at_step: 1, target: rank}", "target='rank' is nobody. .* for kill it is a rank"),
        ("- {fault: drain, at_step: 1, target: -1}", "target=-1 is nobody. .* for drain it is the index of a node"),
        ("- {fault: kill, at_step: 1, target: 3}", "target=rank3 is no rank of a world of at most .*max_workers=3"),
        ("- {fault: drain, at_step: 1, target: 3}", "target=node3 is not among the 3 nodes .*raise --nodes"),
        ("- {fault: kill, at_step: 1, at_world_size: 4}", "at_world_size=4 is more than cluster.max_workers=3"),
    ],
)
def test_what_could_never_happen_is_refused_with_its_place_and_what_to_type(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_faults(tmp_path / "none.yaml", num_steps=1, num_nodes=1, max_workers=1, seed=0)


def test_a_node_that_a_fault_adds_may_be_a_target(tmp_path):
    faults = load(tmp_path, "[{fault: add, at_step: 1}, {fault: remove, at_step: 2, target: 3}]")
    assert faults[1].target == Target(by="node", index=3)
