"""What the rest asks of a family of models: its `Config`, which is read without torch.

A family is one file, `elastic/models/<kind>.py`. It provides

- `Config`, a frozen dataclass that derives from `ModelConfig`, with the knobs of the family, their constraints
  (`constraints.py`) and their marks: `SHAPE` on each that weights are bound to;
- `build(config) -> nn.Module`, on the current default device, normally meta, which takes int64 tokens_BS and labels_BS
  to summed nats, or tokens_BS alone to logits_BSV, and whose `blocks` are its layers. If its `Config` has
  `separates_documents`, it also takes borders_N (`attention.separate`).

A configuration is checked on machines without torch, so the file does not import it at its top: `build` imports what
it computes with, from `decoder.py` or torch itself. Layers of its own are classes within a function with a cache, which
defines them once per process: to a compiler, classes that were defined anew are others.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, cast

from elastic import plugins
from elastic.constraints import NOT_NEGATIVE, POSITIVE, Mark, check_fields, get_marked
from elastic.errors import ConfigError

_FAMILIES = "elastic.models"
MODEL_KIND = "model.kind"
DEFAULT_KIND = "llama"

SHAPE: Final = Mark("shape")
"""Marks a knob that decides the shapes of the weights, or which of their rows belong together (heads): a run cannot go
on with another value."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Heads of each layer; what attention costs, and which back end is the fastest, follows from it."""

    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions; the factors are those of Llama 3.1, for contexts longer than trained on."""

    head_size: int
    theta: float = 10_000.0
    scaling_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """What every family has; `kind` names its file in `elastic/models`."""

    separates_documents: ClassVar[bool] = False
    """The model can compute rows of several documents as if each stood alone."""

    kind: Annotated[str, SHAPE]
    num_layers: Annotated[int, POSITIVE, SHAPE] = 4
    vocab_size: Annotated[int, POSITIVE, SHAPE] = 4096
    max_positions: Annotated[int, NOT_NEGATIVE] = 0
    """The longest sequence the weights were made for. 0: data.seq_len."""
    init_std: Annotated[float, POSITIVE] = 0.02

    def __post_init__(self) -> None:
        check_fields(self, prefix="model.", error=ConfigError)
        if not isinstance(self, get_config_class(self.kind)):
            raise ConfigError(
                f"model.kind={self.kind!r} names another family than {type(self).__module__}. Set model.kind to "
                f"{type(self).__module__.rpartition('.')[2]}, or build the Config of {_FAMILIES}.{self.kind}."
            )

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Trainable parameters; pure arithmetic."""

    @property
    @abstractmethod
    def num_matrix_params(self) -> int:
        """Parameters that take part in a matrix product for each token, the output layer among them."""

    @property
    @abstractmethod
    def attention(self) -> AttentionShape | None:
        """The attention of a layer; None: it has none (`attention.Attend`)."""

    @property
    def block_matrices(self) -> Mapping[str, tuple[int, int]]:
        """Outputs and inputs of a block's linear layers by name: those that may have an adapter (`tuning.py`)."""
        return {}

    def flops_per_token(self, seq_len: int) -> float:
        """Return model FLOPs of forward and backward per target token; pure arithmetic.

        6 per matrix parameter and 12 * layers * heads * head size * seq_len for attention, not halved for the causal
        mask and without recomputation, so that the MFU compares with published ones (Source: PaLM, arXiv:2204.02311,
        appendix B).
        """
        width = self.attention.num_heads * self.attention.head_size if self.attention else 0
        return 6.0 * self.num_matrix_params + 12.0 * self.num_layers * width * seq_len

    def get_shape_keys(self) -> tuple[str, ...]:
        """Return the keys of a configuration that decide the shapes of the weights, the family itself first."""
        return (MODEL_KIND, *(f"model.{name}" for name in get_marked(type(self), SHAPE) if name != "kind"))


def get_config_class(kind: str) -> type[ModelConfig]:
    """Return the `Config` of a family.

    Raises:
        ConfigError: unknown kind.
    """
    return cast(type[ModelConfig], plugins.load(_FAMILIES, kind, key=MODEL_KIND).Config)


def build_model_config(*, kind: str = DEFAULT_KIND, **values: Any) -> ModelConfig:
    """Build the `Config` of a family; what is left out has the family's defaults.

    Raises:
        ConfigError: unknown kind, or values that cannot work.
    """
    return get_config_class(kind)(kind=kind, **values)
