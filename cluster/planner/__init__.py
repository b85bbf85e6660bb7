"""What a run needs, how long it takes and what it costs, from its configuration and an offer: pure arithmetic.

    shape        what a block of the model computes and keeps, per token
    memory       GiB of a GPU, by what takes them and when; host memory beside it
    throughput   seconds of a step, from what the GPU could do and what such work was measured to reach of it
    goodput      what losses, saves and recoveries leave of the time
    candidates   one offer, one number of nodes: all of the above, hours and dollars
    choice       the best of them, the others, what one change would buy; what would have to change if there is none

All is an estimate: the constants say where they were measured. `calibration` moves them to what a GPU does here.
"""
