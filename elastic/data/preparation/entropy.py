"""What can be said of tokens by counting them."""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def cross_entropy_nats(counts: Counts, model_counts: Counts) -> float:
    """Return -sum(p log q), p and q being the frequencies that the counts stand for."""
    seen = counts > 0
    share = counts[seen] / counts.sum()
    return float(-(share * np.log(model_counts[seen] / model_counts.sum())).sum())
