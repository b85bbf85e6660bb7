"""The training loss, as a sum, so that it can be divided once by the token count of all ranks.

Letters: B batch, S sequence, V vocabulary.
"""

import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor

IGNORE = -100
"""Label of a position that has no target: padding, or the filling rows of a batch that ranks cannot share evenly."""


def sum_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats (fp32 scalar); ignored positions add 0, even if there are no others."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), ignore_index=IGNORE, reduction="sum")
