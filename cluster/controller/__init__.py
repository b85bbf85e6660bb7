"""Who trains: a pure state machine over slots (places for one trainer each) and attempts (one world each).

`decide(state, event, now_s=...)` changes `state` and returns the actions to carry out. No I/O, and no clock is read.

    transitions.py the stages of an attempt, and what each event means in them
    worlds.py     which slots the next world is made of, and when the running one should make room for it
    leases.py     which slots Ray Train has no use for any more
    stalls.py     which member holds up a world that makes no progress
    unkillable.py what a process that does not die costs: its slot, then its node
    failures.py   what failures in a row lead to: a node that is left out, a run that stops
    state.py      everything the decisions depend on
"""

from cluster.controller.leases import Holder, find_surplus
from cluster.controller.state import MEMBER_PHASES, Policy, Stage, State
from cluster.controller.transitions import decide
from cluster.controller.worlds import get_usable, get_wanted

__all__ = ["MEMBER_PHASES", "Holder", "Policy", "Stage", "State", "decide", "find_surplus", "get_usable", "get_wanted"]
