"""Causal self-attention by the back end that is fastest for a GPU and a shape.

Letters: B batch, S sequence, H query heads, K key/value heads, E size of one head, N borders of documents, T positions
of all sequences on end.
"""

import hashlib
import importlib.util
import json
import logging
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from typing import Any, get_args

import torch
import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from elastic.config import Attention as Kind
from elastic.config import Precision, RunConfig
from elastic.errors import ConfigError
from elastic.nn.precision import get_dtype
from elastic.storage import Storage

logger = logging.getLogger(__name__)

CHOICES = "tuned/attention-"
"""Where the storage of a run has what was found fastest, for each kind of GPU."""

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_WORTH_IT = 0.97
"""A back end is preferred to those before it for 3 % of its time: less is noise, and would differ from run to run."""


class Attend(nn.Module):
    """Mixes each position's value with those before it; `set_attention` says how."""

    kind: Kind = "auto"
    """auto: torch's own choice."""

    def forward(
        self, query_BHSE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """Return mixed_BHSE; a key/value head serves several query heads.

        Args:
            documents: what `separate` returned; None: all of a sequence is one document.
        """
        if documents is not None:
            return attend_within(query_BHSE, key_BKSE, value_BKSE, documents)
        return attend(query_BHSE, key_BKSE, value_BKSE, kind=self.kind)


def set_attention(model: nn.Module, kind: Kind) -> None:
    """Let all layers use one back end."""
    for module in model.modules():
        if isinstance(module, Attend):
            module.kind = kind


def attend(query_BHSE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, *, kind: Kind) -> Tensor:
    """Compute causal attention with one back end."""
    if kind == "fa4":
        turned = (tensor.transpose(1, 2) for tensor in (query_BHSE, key_BKSE, value_BKSE))
        return _fa4(*turned)[0].transpose(1, 2)
    product = partial(
        F.scaled_dot_product_attention, is_causal=True, enable_gqa=key_BKSE.shape[1] != query_BHSE.shape[1]
    )
    if kind == "auto":
        return product(query_BHSE, key_BKSE, value_BKSE)
    with sdpa_kernel(_BACKENDS[kind]):
        return product(query_BHSE, key_BKSE, value_BKSE)


def separate(borders_N: Tensor, tokens_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the positions_BS of tokens within their documents, and what keeps attention within these.

    Args:
        borders_N: int32: where documents begin in all sequences on end, each of which begins with one, and where the
            last one ends; that may be repeated, so that there may be a fixed number of them.
        dtype: what attention is computed in.

    Returns:
        The latter is the borders themselves where there is a kernel for them (GPU, 16 bits), else a mask_B1SS.
    """
    batch, seq_len = tokens_BS.shape
    places_T = torch.arange(batch * seq_len, device=borders_N.device, dtype=borders_N.dtype)
    document_T = torch.bucketize(places_T, borders_N[1:], right=True)
    positions_BS = (places_T - borders_N[document_T]).view(batch, seq_len)
    if borders_N.device.type == "cuda" and dtype != torch.float32:
        from torch._dynamo import maybe_mark_dynamic  # noqa: PLC0415 - the compiler is large, and CPUs do without

        maybe_mark_dynamic(borders_N, 0)  # another number of them is no other program
        return positions_BS, borders_N
    document_BS = document_T.view(batch, seq_len)
    is_same = document_BS.unsqueeze(-1) == document_BS.unsqueeze(-2)
    return positions_BS, is_same.tril().unsqueeze(1)


def attend_within(query_BHSE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, documents: Tensor) -> Tensor:
    """Compute causal attention that stays within documents, as `separate` has described them."""
    is_grouped = key_BKSE.shape[1] != query_BHSE.shape[1]
    if documents.dtype == torch.bool:
        parts = (query_BHSE, key_BKSE, value_BKSE)
        return F.scaled_dot_product_attention(*parts, attn_mask=documents, enable_gqa=is_grouped)
    seq_len = query_BHSE.shape[2]
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query_BHSE, key_BKSE, value_BKSE))
    mixed = varlen_attn(query, key, value, documents, documents, seq_len, seq_len, window_size=(-1, 0), **_GROUPED)
    assert isinstance(mixed, Tensor)
    return mixed.unflatten(0, (-1, seq_len)).transpose(1, 2)


_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch 2.11 asks for no leave to have fewer key/value heads."""
VARLEN = torch.ops.torch_attn._varlen_attn.default
"""Attention within documents as it appears in a graph."""


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What it depends on which back end is the fastest; not the number of layers, nor the vocabulary."""

    gpu: str
    torch: str
    precision: Precision
    micro_batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int


_CHOSEN: dict[_Case, Kind] = {}
"""What this process uses: once it has computed with one back end it never uses another."""


def choose_attention(config: RunConfig, device: torch.device) -> Kind:
    """Return the configured back end; for `auto` on a GPU, the one that is fastest there for this run's shape.

    Raises:
        ConfigError: the configured one is not there, or cannot do the shape or precision.
    """
    if config.data.packing == "documents":  # `separate` chooses
        return "auto"
    if not _has_choice(config, device):
        if config.attention != "auto":
            raise ConfigError(
                f"attention={config.attention} needs a GPU and 16-bit precision, but this is device={device.type} with "
                f"precision={config.precision}. Set attention=auto."
            )
        return "auto"
    case = _describe(config, device)
    if config.attention != "auto":
        _measure(config.attention, case, device, repeats=1)
        return config.attention
    if case not in _CHOSEN:
        _CHOSEN[case] = _find_fastest(case, device)
    return _CHOSEN[case]


def agree_on_attention(config: RunConfig, device: torch.device, storage: Storage) -> None:
    """Let `choose_attention` answer the same in all processes of a run that have GPUs of one kind.

    Times differ from process to process, most of all where one measures beside others, and what another back end
    computes is rounded otherwise and compiled anew. So the first one writes down what it has found.

    Args:
        storage: the run's. If it does not work, this process goes by what it finds itself.
    """
    if config.attention != "auto" or config.data.packing == "documents" or not _has_choice(config, device):
        return
    case = _describe(config, device)
    if case in _CHOSEN:
        return
    key = CHOICES + hashlib.sha256(json.dumps(asdict(case), sort_keys=True).encode()).hexdigest()[:16]
    try:
        if storage.get_size(key) is None:
            storage.put_new(key, choose_attention(config, device).encode())
        kept = storage.read(key).decode(errors="replace")
    except OSError as error:
        logger.warning("which back end of attention this run uses cannot be read or kept: %s", error)
        return
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    try:
        _measure(kinds[kept], case, device, repeats=1)
        _CHOSEN[case] = kinds[kept]
    except (KeyError, ConfigError) as error:  # damaged, or not installed on this node
        logger.warning("attention=%s, which this run uses, is not possible here: %s", kept, error)


def _has_choice(config: RunConfig, device: torch.device) -> bool:
    return config.model.attention is not None and device.type == "cuda" and get_dtype(config.precision) != torch.float32


def _describe(config: RunConfig, device: torch.device) -> _Case:
    shape = config.model.attention
    assert shape is not None  # `_has_choice` has seen it
    return _Case(
        gpu=torch.cuda.get_device_name(device),
        torch=str(torch.__version__),
        precision=config.precision,
        micro_batch=config.train.micro_batch,
        seq_len=config.data.seq_len,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
    )


def _find_fastest(case: _Case, device: torch.device) -> Kind:
    best: Kind = "auto"
    best_ms, times = float("inf"), dict[str, str]()
    candidates: list[Kind] = ["cudnn", "flash", *(["fa4"] if importlib.util.find_spec("flash_attn") else [])]
    for kind in candidates:
        try:
            kind_ms = _measure(kind, case, device, repeats=10)
        except ConfigError:
            continue
        times[kind] = f"{kind_ms:.3f} ms"
        if kind_ms < _WORTH_IT * best_ms:
            best, best_ms = kind, kind_ms
    logger.info("attention=%s is fastest on %s: %s", best, case.gpu, times)
    return best


def _measure(kind: Kind, case: _Case, device: torch.device, *, repeats: int) -> float:
    """Return the median milliseconds of one layer's attention, forward and backward.

    Raises:
        ConfigError: it does not run.
    """
    dtype = get_dtype(case.precision)
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        # laid out as a projection leaves it
        shape = (case.micro_batch, case.seq_len, num_heads, case.head_size)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).transpose(1, 2).requires_grad_()

    inputs = (draw(case.num_heads), draw(case.num_kv_heads), draw(case.num_kv_heads))
    grad_BHSE = torch.randn_like(inputs[0])
    times_ms: list[float] = []
    try:
        for _ in range(3 + repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.autograd.grad(attend(*inputs, kind=kind), inputs, grad_BHSE)
            end.record()
            end.synchronize()
            times_ms.append(start.elapsed_time(end))
    except (RuntimeError, ImportError, AssertionError) as error:  # what back ends raise for what they cannot do
        why = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ConfigError(
            f"attention={kind} does not run on {case.gpu} for heads of {case.head_size} with "
            f"precision={case.precision} ({why}). Set attention=auto."
        ) from error
    return statistics.median(times_ms[3:])


@torch.library.custom_op("solvent::fa4", mutates_args=())
def _fa4(query_BSHE: Tensor, key_BSKE: Tensor, value_BSKE: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-4, which torch.compile must not look into; returns the mix and the log of each row's sum."""
    from flash_attn.cute.interface import _flash_attn_fwd  # noqa: PLC0415 # pyright: ignore[reportMissingImports] # extra `gpu`

    mixed, log_sums, *_ = _flash_attn_fwd(query_BSHE, key_BSKE, value_BSKE, causal=True, return_lse=True)
    return mixed, log_sums


@_fa4.register_fake
def _(query_BSHE: Tensor, key_BSKE: Tensor, value_BSKE: Tensor) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_heads, _ = query_BSHE.shape
    return (
        query_BSHE.new_empty((batch, seq_len, num_heads, value_BSKE.shape[-1])),
        query_BSHE.new_empty((batch, num_heads, seq_len), dtype=torch.float32),
    )


@torch.library.custom_op("solvent::fa4_backward", mutates_args=())
def _fa4_backward(
    grad_BSHE: Tensor, query_BSHE: Tensor, key_BSKE: Tensor, value_BSKE: Tensor, mixed_BSHE: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # noqa: PLC0415 # pyright: ignore[reportMissingImports] # extra `gpu`

    tensors = (query_BSHE, key_BSKE, value_BSKE, mixed_BSHE, grad_BSHE.contiguous(), log_sums)
    query_grad, key_grad, value_grad, *_ = _flash_attn_bwd(*tensors, causal=True)
    return query_grad, key_grad, value_grad


@_fa4_backward.register_fake
def _(
    grad_BSHE: Tensor, query_BSHE: Tensor, key_BSKE: Tensor, value_BSKE: Tensor, mixed_BSHE: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (query_BSHE.shape, key_BSKE.shape, value_BSKE.shape)
    query_grad, key_grad, value_grad = (query_BSHE.new_empty(shape) for shape in shapes)
    return query_grad, key_grad, value_grad


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_BSHE: Tensor, _grad_of_log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fa4_backward(grad_BSHE, *ctx.saved_tensors)


_fa4.register_autograd(_backward, setup_context=_keep_for_backward)

FA4 = torch.ops.solvent.fa4.default
"""FlashAttention-4 as it appears in a graph."""
