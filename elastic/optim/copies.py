"""AdamW for fp32 weights that have a copy in low precision: on a GPU, one pass over weights, gradients and moments."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from elastic.config import OptimConfig
from elastic.optim.adamw import AdamW

# torch._foreach_*, as torch.optim uses them, are not in torch's __all__:
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

if TYPE_CHECKING:
    from elastic.nn.kernels.adamw import AdamWKernel


class CopyingAdamW(AdamW):
    """AdamW whose gradients may be in low precision, and whose update writes the copies as well.

    State and its names are those of `torch.optim.AdamW(fused=True)`, and are there at once.

    Args:
        copies: in low precision, one for each parameter; kept up to date by the update.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, *, copies: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__(model, config)
        self._copies = copies
        self._factor: Tensor | None = None
        self._kernels: list[AdamWKernel | None] = [None] * len(self.param_groups)
        self._is_located = False
        for param in copies:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Return the norm of all gradients; the next update multiplies them by what brings it down to `max_norm`.

        The arithmetic of `clip_grad_norm_` without its pass over the gradients. What the update needs is made ready
        here, while the device is still busy with the backward.
        """
        grads = [_get_grad(param) for group in self.param_groups for param in group["params"]]
        norms = torch._foreach_norm(grads, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if norm.device.type == "cuda":
            self._locate(self._factor)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update; every parameter has a gradient."""
        assert closure is None
        factor, self._factor = self._factor, None
        if next(iter(self._copies)).device.type != "cuda":
            for param in self._copies:
                param.grad = _get_grad(param).float() if factor is None else _get_grad(param).float().mul_(factor)
            super().step()
            originals, copies = zip(*self._copies.items(), strict=True)
            torch._foreach_copy_(copies, originals)
            return
        if not self._is_located:
            self._locate(factor)
        self._is_located = False
        for group, kernel in zip(self.param_groups, self._kernels, strict=True):
            if kernel is None:
                continue
            kernel.update(
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            torch._foreach_add_([self.state[param]["step"] for param in group["params"]], 1)

    def _locate(self, factor: Tensor | None) -> None:
        """Tell the kernels where everything lies: gradients move from step to step, state when it is loaded."""
        from elastic.nn.kernels.adamw import AdamWKernel  # noqa: PLC0415 - Triton is where GPUs are

        for index, group in enumerate(self.param_groups):
            params = group["params"]
            if not params:
                continue
            kernel = self._kernels[index] = self._kernels[index] or AdamWKernel(params)
            states = [self.state[param] for param in params]
            age = states[0]["step"].double() + 1  # the same for all; in double: 1 - 0.999**age loses digits
            beta1, beta2 = group["betas"]
            multiplier = torch.ones_like(age) if factor is None else factor.double()
            kernel.locate(
                params,
                [_get_grad(param) for param in params],
                ([state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]),
                [self._copies[param] for param in params],
                factors=torch.stack([multiplier, 1 - beta1**age, (1 - beta2**age).sqrt()]).float(),
            )
        self._is_located = True


def _get_grad(param: nn.Parameter) -> Tensor:
    assert param.grad is not None, "a parameter has no gradient"
    return param.grad
