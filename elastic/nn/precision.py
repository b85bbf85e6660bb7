"""What each precision means: weights and optimizer state are always fp32, activations and products are not.

Two ways to the same end: FSDP2 casts parameters when it gathers them (`build_policy`), a model that is not
sharded is cast operation by operation (`autocast`). Gradients are always reduced in fp32.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy

from elastic.config import Precision, RunConfig
from elastic.errors import ConfigError

_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
    "fp8_rowwise": torch.bfloat16,
}
"""Of activations, and of what products read before they cast it further."""


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device only emulates.

    Raises:
        ConfigError: fp8 on what is older than Ada, bf16 on a GPU older than Ampere.
    """
    if precision in ("fp8", "fp8_rowwise") and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)
    ):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ConfigError(
            f"precision={precision}, but {name} has no fp8 arithmetic (it came with Ada and Hopper, compute capability "
            "8.9). Set precision=bf16."
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"precision=bf16, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic (it came with Ampere, "
            "compute capability 8.0) and would emulate it slowly. Set precision=fp16."
        )


def build_policy(config: RunConfig) -> MixedPrecisionPolicy:
    """Return what FSDP2 casts: gathered parameters to low precision, gradients to fp32 before they are summed.

    Frozen weights in 4 bits are bytes, of which a cast would make numbers; what is beside them casts itself.
    """
    param_dtype = None if config.tune == "qlora" else _DTYPES[config.precision]
    # Inputs are not cast: activations have the right dtype from the embedding on, and rotary tables must stay fp32.
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for the forward of a model whose parameters stay fp32."""
    return nullcontext() if get_dtype(precision) == torch.float32 else torch.autocast(device.type, get_dtype(precision))


def build_cast(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return what makes the context for the forward of a model that no strategy casts.

    Frozen weights are held in what products read (`elastic/nn/lora.py`), so that nothing is left to cast.
    """
    return nullcontext if config.tune != "full" else partial(autocast, config.precision, device)


def set_tf32(precision: Precision) -> None:
    """Let products of fp32 tensors round their inputs to 10 bits, or forbid it; a setting of the process."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def get_dtype(precision: Precision) -> torch.dtype:
    """Return the type of activations."""
    return _DTYPES[precision]


def get_compute_dtype(activations: Tensor) -> torch.dtype:
    """Return what products make of these activations, where this is called."""
    kind = activations.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else activations.dtype


def build_scaler(precision: Precision, device: torch.device) -> GradScaler:
    """Build the loss scaler that keeps small fp16 gradients from vanishing; disabled unless fp16."""
    return GradScaler(device.type, enabled=precision == "fp16")
