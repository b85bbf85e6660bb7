"""What one row of `metrics.jsonl` says, and how fast the hardware could have been."""

from typing import TYPE_CHECKING

from elastic.ports import Progress
from elastic.records.rundir import format_utc

if TYPE_CHECKING:
    import torch

PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("MI300X", 1307.4e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362.05e12),
    ("L40", 181.05e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A6000", 154.8e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
)
"""Part of a device's name -> dense FLOP/s of its tensor cores with bf16 inputs and fp32 sums (V100 and T4 have no
bf16: fp16). The first match counts, so a longer name stands before its prefix.

Source: NVIDIA's data sheets, whose figures "with sparsity" are halved: nvidia.com/en-us/data-center/{dgx-b200,h200,
h100,a100,l40s,l40,l4,a40,products/a10-gpu,tesla-v100,tesla-t4}; the architecture white papers of Ampere GA102
(RTX 3090: 71, RTX A6000: 154.8), Ada (RTX 4090: 165.2) and Blackwell RTX (RTX 5090: 209.5), appendix "peak FP16/BF16
tensor TFLOPS with FP32 accumulate"; A10G: 70, NVIDIA's data sheet for the card that AWS calls g5; AMD's data sheet of
the MI300X. Compared on 2026-11-24 with public tables that quote these sheets, not with the sheets themselves.
"""


def get_peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device named as `torch.cuda.get_device_name` does; None if unknown (or a CPU).

    A name counts only as a whole word, so that an unknown "L400" is not taken for an L4.
    """
    words = f" {device_name.replace('-', ' ')} "
    return next((flops for name, flops in PEAK_BF16_FLOPS if f" {name} " in words), None)


def get_mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Return model FLOPs utilization: the model's useful FLOP/s as a share of the peak, recomputation not counted.

    Always against the bf16 peak, whatever the precision, so that runs compare.
    Source: PaLM, arXiv 2204.02311, appendix B.

    Args:
        flops_per_token: forward and backward.
        peak_flops: of all devices that made `tokens_per_s` together; None leaves the question open.
    """
    return tokens_per_s * flops_per_token / peak_flops if peak_flops else None


def get_memory_gib(device: "torch.device") -> float:
    """Return the peak of allocated device memory, or of this process's resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        import torch  # noqa: PLC0415 - the planner reads the peaks above without torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # noqa: PLC0415 - not on Windows
    import sys  # noqa: PLC0415 - as above

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def build_row(
    progress: Progress,
    *,
    loss: float,
    grad_norm: float,
    lr: float,
    step_s: float,
    step_tokens: int,
    flops_per_token: float,
    peak_flops_per_gpu: float | None,
    world_size: int,
    attempt: int,
    memory_gib: float,
    now_s: float,
    bad_step: str | None = None,
    val_loss: float | None = None,
    unkept_steps: tuple[int, int] | None = None,
) -> dict[str, object]:
    """Return one row of `metrics.jsonl`, for the step that brought training to `progress`.

    Args:
        step_tokens: target tokens of this step, over all ranks.
        bad_step: why the update was not made; left out of the row if it was.
        val_loss: left out of the row unless this step was evaluated.
        unkept_steps: how many steps would be made again if a trainer, and if a node were lost now; left out where no
            states are kept in memory.
    """
    tokens_per_s = step_tokens / step_s
    peak_flops = peak_flops_per_gpu * world_size if peak_flops_per_gpu else None
    row: dict[str, object] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "step_s": step_s,
        "tokens_per_s": tokens_per_s,
        "mfu": get_mfu(tokens_per_s, flops_per_token, peak_flops),
        "world_size": world_size,
        "attempt": attempt,
        "memory_gib": memory_gib,
        "time_utc": format_utc(now_s),
    }
    seldom: dict[str, object] = {"bad_step": bad_step, "val_loss": val_loss}
    if unkept_steps is not None:
        seldom |= {"redo_steps_trainer_lost": unkept_steps[0], "redo_steps_node_lost": unkept_steps[1]}
    return row | {name: value for name, value in seldom.items() if value is not None}
