"""A run along a recorded or invented fleet, in a fake clock: the real controller decides, the real ledger counts.

    generator   fleets by lot: heavy-tailed lives, losses in batches, grants of a part
    saving      when state is put where a loss does not reach it, and what is left of work after one
    work        what worlds work, keep and lose, and the ledger of it
    engine      events in, the controller's actions out, time in between
    outcome     what came of it, by policy
    plot        the same as pictures

Between two events nothing is stepped through: work, saves and what was redone follow from the time that has passed.
"""
