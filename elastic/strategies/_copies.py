"""A copy of the model in low precision computes; the fp32 original learns.

What FSDP2 does with every unit in every microbatch (cast the weights, cast the gradients) happens here once a step, and
not in passes of its own: the update reads the gradients as they are and writes the copy (`elastic/optim/copies.py`).
What is computed is what FSDP2's mixed precision computes, up to the order of sums: being a copy, its layers are joined
where that is faster.
"""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

# torch._foreach_*, as torch.optim uses them, are not in torch's __all__:
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from elastic.nn.graphs import GraphedLoss
from elastic.nn.layers import Joinable


class LowPrecisionCopy:
    """Runs the copy; gradients appear on the parameters of the original."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, device: torch.device, uses_graphs: bool) -> None:
        """Copy a model that is still on the meta device, and give both memory on `device`."""
        self.model = deepcopy(model).to(dtype).to_empty(device=device)
        model.to_empty(device=device)
        self.copies = self._pair(model)
        self._versions: list[int] = []
        self._uses_graphs, self._graphs = uses_graphs, None
        self._is_last_microbatch = True

    def _pair(self, model: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Join layers of the copy; return each original's place in it."""
        places = dict[str, Tensor](self.model.named_parameters())
        for prefix, module in self.model.named_modules():
            if isinstance(module, Joinable):
                module.join()
                places |= {f"{prefix}.{name}": place for name, place in module.get_joined().items()}
        copies = {original: places[name] for name, original in model.named_parameters()}
        by_place = {place.data_ptr(): original for original, place in copies.items()}
        for param in self.model.parameters():
            parts, first = list[nn.Parameter](), 0
            while first < param.numel():  # a joined parameter has several originals
                original = by_place[param.data_ptr() + first * param.element_size()]
                original.grad_dtype = None  # any
                parts.append(original)
                first += original.numel()
            param.register_post_accumulate_grad_hook(partial(self._hand_over, parts))
        return copies

    def set_last_microbatch(self, is_last: bool) -> None:
        """Tell whether the gradient of the next backward is the last one of the step."""
        self._is_last_microbatch = is_last

    def __call__(self, tokens_BS: Tensor, labels_BS: Tensor, *borders_N: Tensor) -> Tensor:
        """Return the summed nats; weights that were written by anything but the update are copied first."""
        versions = [original._version for original in self.copies]
        if versions != self._versions:
            with torch.no_grad():
                torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            self._versions = versions
        if not self._uses_graphs or not torch.is_grad_enabled() or borders_N:  # of which there may be any number
            return self.model(tokens_BS, labels_BS, *borders_N)
        if self._graphs is None:
            self._graphs = GraphedLoss(self.model, tokens_BS, labels_BS)
        return (self._graphs if self._graphs.fits(tokens_BS) else self.model)(tokens_BS, labels_BS)

    def _hand_over(self, originals: list[nn.Parameter], copy: Tensor) -> None:
        """Move a gradient to the originals: as it is if it is the step's only one, else into a sum in fp32."""
        whole, copy.grad = copy.grad, None
        assert whole is not None
        rows = whole.split([len(original) for original in originals])
        for original, grad in zip(originals, rows, strict=True):
            if original.grad is not None:
                original.grad.add_(grad)
            else:
                original.grad = grad if self._is_last_microbatch else grad.float()
