"""AdamW for parameters that are spread over ranks: each rank updates the rows that it holds."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from elastic.config import OptimConfig
from elastic.optim.adamw import AdamW

# torch._foreach_*, as torch.optim uses them, are not in torch's __all__:
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false


class ShardedAdamW(AdamW):
    """AdamW on DTensors; state and its names are those of `torch.optim.AdamW(fused=True)`, and are there at once.

    The update treats each element by itself, so none of it needs to know of the others. Asked for it as one of whole
    tensors, DTensor works out for each of them how it is done on a mesh of this size: once per size, in the first step
    after a change of the world, on the CPU, for 75 ms with 4 layers and for 0.3 s with 16.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        super().__init__(model, config)
        self._params = [cast(DTensor, param) for group in self.param_groups for param in group["params"]]
        self._divisor: Tensor | None = None
        for param in self._params:
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": _make_zeros(param),
                "exp_avg_sq": _make_zeros(param),
            }

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Return the norm of all gradients; the next update divides them by what brings it down to `max_norm`.

        The arithmetic of `clip_grad_norm_` without its pass over the gradients.
        """
        norms = torch._foreach_norm(_get_locals([param.grad for param in self._params]), dtype=torch.float32)
        square = torch.linalg.vector_norm(torch.stack(list(norms))).square()
        for group in _get_shard_groups(self._params[0]):
            dist.all_reduce(square, group=group)
        norm = square.sqrt()
        self._divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update; every parameter has a gradient."""
        assert closure is None
        divisor, self._divisor = self._divisor, None
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            states = [self.state[param] for param in params]
            beta1, beta2 = group["betas"]
            adamw(
                _get_locals(params),
                _get_locals([param.grad for param in params]),
                _get_locals([state["exp_avg"] for state in states]),
                _get_locals([state["exp_avg_sq"] for state in states]),
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=divisor,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _make_zeros(like: DTensor) -> DTensor:
    return DTensor.from_local(
        torch.zeros_like(like.to_local()),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _get_locals(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return this rank's parts, sharing their memory."""
    return [cast(DTensor, tensor).to_local() for tensor in tensors]


def _get_shard_groups(param: DTensor) -> list[dist.ProcessGroup]:
    """Return the groups over which a parameter is cut; along the other axes of its mesh all ranks have the same."""
    return [
        param.device_mesh.get_group(axis) for axis, place in enumerate(param.placements) if isinstance(place, Shard)
    ]
