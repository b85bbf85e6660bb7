"""Python runs this in hosts that start with this folder on their path: a step of their trainers takes some more time,
in which they do not compute, as where a GPU does. They leave the processors to all else that tests start and end."""

import os
import sys
import time

if (step_s := float(os.environ.get("PACED_STEP_S", "0"))) and "cluster.runtime.node.host" in sys.orig_argv:
    from elastic.optim import lr_schedule

    compute = lr_schedule.learning_rate

    def learning_rate(*args: object) -> float:
        time.sleep(step_s)
        return compute(*args)

    lr_schedule.learning_rate = learning_rate
