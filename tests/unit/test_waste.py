"""Every dollar is in one place: progress, an incident, or another cause."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger import CAUSES, STATES, LedgerRow, check_dollars, totals_of
from cluster.waste import split_dollars


def tile(start_s, end_s, state, node="a", usd_per_s=1.0):
    length_s = end_s - start_s
    return LedgerRow(
        node=node,
        start_ms=round(1000 * start_s),
        end_ms=round(1000 * end_s),
        state=state,
        gpus=1,
        usd=length_s * usd_per_s,
    )


def incident(start_s, outage_s, *, detect_s=1.0, kind="node_lost"):
    return {
        "kind": kind,
        "node": "n",
        "step": 5,
        "detected_s": start_s + detect_s,
        "outage_s": outage_s,
        "phases_s": {"detect": detect_s},
    }


def test_an_incident_is_charged_with_its_outage_and_what_was_done_again():
    tiles = [
        tile(0, 10, "start"),
        tile(10, 100, "train"),
        tile(100, 104, "reconfigure"),
        tile(104, 110, "load"),
        tile(110, 130, "redo"),
        tile(130, 200, "train"),
        tile(200, 203, "save"),
        tile(100, 110, "wait", node="b", usd_per_s=2.0),  # another node stood still meanwhile
        tile(110, 150, "wait", node="b", usd_per_s=2.0),
    ]
    waste = split_dollars(tiles, [incident(100, 10)])
    assert waste.progress_usd == 160
    (share,) = waste.incidents
    assert (share.outage_usd, share.redo_usd) == (pytest.approx(10 + 20), pytest.approx(20))
    assert {cause: usd for cause, usd in waste.other_usd.items() if usd > 1e-9} == pytest.approx(
        {"starting": 10, "saving": 3, "waiting": 80}
    )


def test_what_is_done_again_belongs_to_the_incident_before_it():
    tiles = [tile(0, 10, "load"), tile(10, 20, "redo"), tile(20, 30, "load"), tile(30, 60, "redo")]
    first, second = split_dollars(tiles, [incident(0, 10), incident(20, 10)]).incidents
    assert (first.redo_usd, second.redo_usd) == (pytest.approx(10), pytest.approx(30))


def test_an_incident_that_does_not_say_when_costs_nothing():
    waste = split_dollars([tile(0, 10, "load")], [{"kind": "x"}])
    assert waste.incidents[0].usd == 0
    assert waste.other_usd == {"recovery": pytest.approx(10)}


SPANS = st.lists(st.tuples(st.floats(0, 500), st.floats(0, 100)), max_size=8)
TILES = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.floats(0, 500), st.floats(0.01, 100), st.sampled_from(STATES), st.floats(0, 5)
    ),
    max_size=40,
)


@given(spans=SPANS, tiles=TILES)
def test_no_dollar_is_lost_or_counted_twice(spans, tiles):
    made = [tile(start, start + length, state, node, usd) for node, start, length, state, usd in tiles]
    waste = split_dollars(made, [incident(start, length) for start, length in spans])
    assert waste.usd == pytest.approx(math.fsum(row.usd for row in made), abs=1e-6)
    assert min([0.0, *waste.other_usd.values(), *(share.usd for share in waste.incidents)]) > -1e-6


@given(tiles=TILES)
def test_causes_and_progress_are_all_of_it(tiles):
    totals = totals_of(tile(start, start + length, state, node, usd) for node, start, length, state, usd in tiles)
    wasted = math.fsum(totals.usd_by_cause.values())
    assert totals.usd_by_state.get("train", 0.0) + wasted == pytest.approx(totals.usd)
    assert set(CAUSES) | {"train"} == set(STATES)
    assert totals.available_goodput >= totals.goodput


def test_a_tile_with_another_price_is_found():
    good = [tile(0, 10, "train"), tile(10, 20, "wait")]
    assert check_dollars(good) == []
    (problem,) = check_dollars([*good, tile(20, 30, "train", usd_per_s=1.5)])
    assert "USD were booked" in problem
