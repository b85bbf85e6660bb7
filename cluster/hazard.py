"""What losses cost on average, before they happen. Pure."""


def predict_goodput(
    *, save_s: float, interval_s: float, between_losses_s: float, between_outages_s: float, outage_s: float
) -> float:
    """Return the share of time that makes progress which lasts, to first order; 0 where losses leave nothing.

    ``1 - d/T - T/(2 M) - R/M'``: every interval T is paid with one save d; a loss comes every M and takes half an
    interval of work with it on average; an outage R comes every M'. M' is M where every outage is a loss; a planned
    change of the world is an outage that loses no work. It holds while d << T << M.

    Args:
        save_s: d, how long one save holds training up.
        interval_s: T, from save to save.
        between_losses_s: M, mean time between losses without notice; infinite if there are none.
        between_outages_s: M', mean time between changes of the world for whatever reason.
        outage_s: R, mean time from the last step of one world to the first of the next.

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974, whose
    sqrt(2 d M) is the T that makes this largest.
    """
    return max(0.0, 1 - save_s / interval_s - interval_s / 2 / between_losses_s - outage_s / between_outages_s)
