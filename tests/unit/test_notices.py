"""What readings of notices amount to, whatever their order."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.notices import MOVED_S, Departure, Outlook, Report, Source, find_acknowledgeable, get_departure, update
from cluster.notices import is_other as is_news
from cluster.providers import NodeNotice

AWS, FILE = Source("aws", "spot/instance-action"), Source("plain", "/tmp/notice")


def leave(id_="a", **fields):
    return NodeNotice(id=id_, reason=f"reason {id_}", **fields)


NOTICES = st.lists(
    st.builds(
        NodeNotice,
        id=st.sampled_from("abc"),
        reason=st.just("r"),
        kind=st.sampled_from(["leave", "advice"]),
        deadline_s=st.none() | st.floats(0, 1000),
    )
    | st.builds(NodeNotice, id=st.sampled_from("de"), reason=st.just("r"), lead_s=st.sampled_from([5.0, 30.0])),
    max_size=4,
    unique_by=lambda notice: notice.id,
)
READINGS = st.lists(st.tuples(st.sampled_from([AWS, FILE]), NOTICES), max_size=8)


@given(READINGS)
def test_the_departure_is_the_earliest_end_that_the_newest_readings_are_sure_of(readings):
    outlook, newest = Outlook(), {}
    for number, (source, notices) in enumerate(readings):
        update(outlook, source, notices, now_s=number)
        newest[source] = notices
    sure = [notice for notices in newest.values() for notice in notices if notice.kind == "leave"]
    departure = get_departure(outlook)
    assert (departure is None) == (not sure)
    named = [notice.deadline_s for notice in sure if notice.deadline_s is not None]
    if named and not any(notice.lead_s for notice in sure):
        assert abs(departure.deadline_s - min(named)) <= MOVED_S


@given(READINGS, NOTICES)
def test_a_reading_that_is_repeated_changes_nothing(readings, last):
    outlook = Outlook()
    for number, (source, notices) in enumerate(readings):
        update(outlook, source, notices, now_s=number)
    update(outlook, AWS, last, now_s=100)
    departure = get_departure(outlook)
    for now_s in (101, 150, 1000):
        assert update(outlook, AWS, last, now_s=now_s) == []
        assert get_departure(outlook) == departure


@given(READINGS)
def test_every_notice_that_was_given_is_withdrawn_when_nothing_holds_any_more(readings):
    outlook, held = Outlook(), set()
    for number, (source, notices) in enumerate([*readings, (AWS, []), (FILE, [])]):
        for change in update(outlook, source, notices, now_s=number):
            key = (change.source, change.notice.id)
            if change.kind == "withdrawn":
                held.remove(key)
            else:
                assert (key in held) or change.kind == "given"
                held.add(key)
    assert held == set()
    assert get_departure(outlook) is None


def test_a_lead_time_runs_from_the_first_sight_also_when_it_is_corrected():
    outlook = Outlook()
    update(outlook, AWS, [leave(lead_s=30)], now_s=100)
    update(outlook, AWS, [leave(lead_s=30)], now_s=120)
    assert get_departure(outlook).deadline_s == 130
    (moved,) = update(outlook, AWS, [leave(lead_s=25)], now_s=121)
    assert (moved.kind, get_departure(outlook).deadline_s) == ("moved", 125)


def test_a_deadline_that_only_wobbles_has_not_moved():
    outlook = Outlook()
    update(outlook, AWS, [leave(deadline_s=100)], now_s=0)
    assert update(outlook, AWS, [leave(deadline_s=101)], now_s=1) == []
    (moved,) = update(outlook, AWS, [leave(deadline_s=102)], now_s=2)
    assert moved.kind == "moved"


def test_advice_that_becomes_certain_is_a_new_notice():
    outlook = Outlook()
    update(outlook, AWS, [leave(kind="advice")], now_s=0)
    assert get_departure(outlook) is None
    (change,) = update(outlook, AWS, [leave()], now_s=1)
    assert change.kind == "given"
    assert get_departure(outlook) == Departure(provider="aws", reason="reason a", deadline_s=None)


def test_a_departure_is_news_if_it_is_the_first_or_its_time_is_another():
    at_100, at_101, at_200, unknown = (
        Departure(provider="p", reason="r", deadline_s=deadline_s) for deadline_s in (100, 101, 200, None)
    )
    assert is_news(None, unknown) and is_news(at_100, at_200) and is_news(unknown, at_100) and is_news(at_100, None)
    assert not is_news(at_100, at_101) and not is_news(unknown, unknown) and not is_news(None, None)


MACHINES = st.lists(st.sampled_from("stuvw"), min_size=1, unique=True).map(tuple)


@given(st.dictionaries(st.sampled_from("123"), MACHINES), st.sets(st.sampled_from("stuv")))
def test_an_acknowledgement_gives_up_only_machines_that_are_clear(events, clear):
    """Node s is machine s, and so on; w is a stranger's."""
    reports = {
        node: [Report(id=id_, machine=node, machines=machines) for id_, machines in events.items() if node in machines]
        for node in "stuv"
    }
    chosen = find_acknowledgeable(reports, clear)
    for id_, machines in events.items():
        assert (id_ in chosen) == (set(machines) <= clear)
    assert all(node in events[id_] for id_, node in chosen.items())


def test_a_notice_whose_other_machines_were_not_heard_of_yet_is_not_acknowledged():
    both = ("a", "b")
    reports = {"node-a": [Report(id="1", machine="a", machines=both)]}
    assert find_acknowledgeable(reports, {"node-a", "node-b"}) == {}
    reports["node-b"] = [Report(id="1", machine="b", machines=both)]
    assert find_acknowledgeable(reports, {"node-a"}) == {}
    assert find_acknowledgeable(reports, {"node-a", "node-b"}) == {"1": "node-a"}
