"""What each GPU can do, as its maker says, and how much of its memory a program is really given.

Peaks are dense: data sheets that say "with sparsity" are halved. `tests/unit/test_catalog.py` holds the bf16 peaks
against those of `elastic/training/metrics.py`, which the MFU of a run is measured by.

Source: NVIDIA's data sheets of T4, V100, A10, A40, RTX A6000, A100, L4, L40S, H100, H200 and DGX B200; the white
papers of Ampere GA102, Ada and Blackwell RTX (appendix A) for GeForce; AWS's page of g5 for the A10G; AMD's data sheet
of the MI300X. `memory_gib` is what torch calls the total capacity, as its out-of-memory messages do in public issues
(139.8 GiB of an H200 was read here, the others were not looked up anew). Speeds of links are per direction. The 16-bit
and fp32 peaks of T4, V100, A100, H100 SXM and PCIe were compared with those that Lightning quotes from the same sheets
(pytorch-lightning@0810121f, its module of throughputs; its A10G has the sums in fp16 of an A10).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from elastic.config import Precision
from elastic.errors import ConfigError

Link = Literal["nvlink", "pcie", "infinity-fabric"]

_CONTEXT_GIB = 1.3
"""CUDA's context and NCCL's buffers, outside of what torch counts. Measured on an H200: 0.75 GiB, 1.3 with a group."""
_FRAGMENTATION = 0.03
"""Of the memory that torch reserves and cannot use; an estimate: blocks are whole steps' tensors of few sizes."""


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One kind of GPU."""

    name: str
    memory_gib: float
    """What torch can see of it."""
    bf16_flops: float
    """Per second, dense, with fp32 sums; fp16 where there is no bf16 (before Ampere)."""
    fp8_flops: float | None
    tf32_flops: float | None
    fp32_flops: float
    bandwidth_bytes_per_s: float
    """Of its own memory."""
    link: Link
    """Between GPUs of one node."""
    link_bytes_per_s: float
    """Per direction."""
    peer_to_peer: bool
    """A GPU of the node reads another's memory itself; else all that they exchange goes through host memory."""
    capability: tuple[int, int]
    """CUDA's compute capability; for AMD the numbers of its architecture's name."""

    @property
    def usable_gib(self) -> float:
        """What tensors may take."""
        return self.memory_gib * (1 - _FRAGMENTATION) - _CONTEXT_GIB

    def get_peak_flops(self, precision: Precision) -> float | None:
        """Return FLOP/s of products in this precision; None if the GPU has no such arithmetic."""
        match precision:
            case "fp32":
                return self.fp32_flops
            case "tf32":
                return self.tf32_flops
            case "fp16":
                return self.bf16_flops
            case "bf16":
                return self.bf16_flops if self.capability >= (8, 0) else None
            case "fp8" | "fp8_rowwise":
                return self.fp8_flops


def _gpu(
    name: str,
    gib: float,
    teraflops: tuple[float, float | None, float | None, float],
    gigabytes_per_s: float,
    link: tuple[Link, float],
    *,
    capability: tuple[int, int],
    peer_to_peer: bool = True,
) -> GpuSpec:
    bf16, fp8, tf32, fp32 = teraflops
    return GpuSpec(
        name=name,
        memory_gib=gib,
        bf16_flops=bf16 * 1e12,
        fp8_flops=fp8 and fp8 * 1e12,
        tf32_flops=tf32 and tf32 * 1e12,
        fp32_flops=fp32 * 1e12,
        bandwidth_bytes_per_s=gigabytes_per_s * 1e9,
        link=link[0],
        link_bytes_per_s=link[1] * 1e9,
        peer_to_peer=peer_to_peer,
        capability=capability,
    )


_PCIE3: tuple[Link, float] = ("pcie", 16)
_PCIE4: tuple[Link, float] = ("pcie", 32)
_PCIE5: tuple[Link, float] = ("pcie", 64)
_SPECS = (
    # name, GiB, (bf16, fp8, tf32, fp32) TFLOP/s, GB/s, link
    _gpu("T4", 14.7, (65, None, None, 8.1), 320, _PCIE3, capability=(7, 5)),
    _gpu("V100", 15.8, (125, None, None, 15.7), 900, ("nvlink", 150), capability=(7, 0)),
    _gpu("RTX3090", 23.7, (71, None, 35.6, 35.6), 936, _PCIE4, capability=(8, 6), peer_to_peer=False),
    _gpu("RTX4090", 23.5, (165.2, 330.3, 82.6, 82.6), 1008, _PCIE4, capability=(8, 9), peer_to_peer=False),
    _gpu("RTX5090", 31.3, (209.5, 419, 104.8, 104.8), 1792, _PCIE5, capability=(12, 0), peer_to_peer=False),
    _gpu("A10G", 22.0, (70, None, 35, 31.2), 600, _PCIE4, capability=(8, 6), peer_to_peer=False),
    _gpu("L4", 22.0, (121, 242.5, 60, 30.3), 300, _PCIE4, capability=(8, 9)),
    _gpu("L40S", 44.4, (362.05, 733, 183, 91.6), 864, _PCIE4, capability=(8, 9)),
    _gpu("A40", 44.4, (149.7, None, 74.8, 37.4), 696, _PCIE4, capability=(8, 6)),
    _gpu("A6000", 47.4, (154.8, None, 77.4, 38.7), 768, _PCIE4, capability=(8, 6)),
    _gpu("A100-40GB-PCIe", 39.4, (312, None, 156, 19.5), 1555, _PCIE4, capability=(8, 0)),
    _gpu("A100-40GB-SXM", 39.4, (312, None, 156, 19.5), 1555, ("nvlink", 300), capability=(8, 0)),
    _gpu("A100-80GB-PCIe", 79.2, (312, None, 156, 19.5), 1935, _PCIE4, capability=(8, 0)),
    _gpu("A100-80GB-SXM", 79.2, (312, None, 156, 19.5), 2039, ("nvlink", 300), capability=(8, 0)),
    _gpu("H100-PCIe", 79.1, (756, 1513, 378, 51), 2000, _PCIE5, capability=(9, 0)),
    _gpu("H100-NVL", 93.1, (835.5, 1670.5, 417.5, 60), 3938, ("nvlink", 300), capability=(9, 0)),
    _gpu("H100-SXM", 79.1, (989.4, 1978.9, 494.7, 67), 3350, ("nvlink", 450), capability=(9, 0)),
    _gpu("H200", 139.8, (989.4, 1978.9, 494.7, 67), 4800, ("nvlink", 450), capability=(9, 0)),
    _gpu("B200", 178.4, (2250, 4500, 1125, 75), 7700, ("nvlink", 900), capability=(10, 0)),
    _gpu("MI300X", 191.5, (1307.4, 2614.9, 653.7, 163.4), 5300, ("infinity-fabric", 448), capability=(9, 4)),
)
SPECS: Mapping[str, GpuSpec] = {spec.name: spec for spec in _SPECS}

_ALIASES: Mapping[str, str] = {
    # of SkyPilot's catalogs, gpuhunt and torch, in small letters and without blanks, underscores and dashes
    "a100": "A100-40GB-SXM",
    "a10040gb": "A100-40GB-SXM",
    "a10080gb": "A100-80GB-SXM",
    "a100sxm440gb": "A100-40GB-SXM",
    "a100sxm480gb": "A100-80GB-SXM",
    "a100pcie40gb": "A100-40GB-PCIe",
    "a10080gbpcie": "A100-80GB-PCIe",
    "h100": "H100-SXM",
    "h10080gbhbm3": "H100-SXM",
    "h100mega": "H100-SXM",
    "h100nvlink": "H100-NVL",
    "h200sxm": "H200",
    "b200sxm": "B200",
    "rtxa6000": "A6000",
    "v10016gb": "V100",
    "v100sxm216gb": "V100",
    "teslat4": "T4",
}
_PLAIN = {name.lower().replace("-", ""): name for name in SPECS} | dict(_ALIASES)


def find_spec(name: str) -> GpuSpec | None:
    """Return the GPU that a catalog or torch calls so; None if it is none of ours."""
    plain = "".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    found = _PLAIN.get(plain.replace("_", "").replace("-", ""))
    return SPECS[found] if found else None


def get_spec(name: str) -> GpuSpec:
    """Return what is known of a GPU.

    Raises:
        ConfigError: nothing is. What it could reach is refused, not guessed.
    """
    spec = find_spec(name)
    if spec is None:
        near = get_close_matches(name.lower().replace("-", ""), list(_PLAIN), n=1)
        hint = f"Did you mean {_PLAIN[near[0]]}?" if near else f"Known are: {', '.join(SPECS)}."
        raise ConfigError(
            f"gpu={name!r} is in no table here, so its memory and what it reaches of its peak would be guesses. {hint} "
            "Else measure it: `solvent bench` says what a machine does."
        )
    return spec
