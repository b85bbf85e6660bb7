"""Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Options make it a Qwen2 (`qkv_bias`), a Qwen3 (`qk_norm`, `head_dim`) or a SmolLM3 (`no_rope_layer_interval`); the
tensors map one to one onto those of Hugging Face's classes (`checkpoint/hf`).

Source: Llama 2, arXiv:2307.09288; Qwen2, arXiv:2407.10671; Qwen3, arXiv:2505.09388; layers without positions,
arXiv:2501.18795.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from elastic.constraints import NOT_NEGATIVE, POSITIVE, Constraint
from elastic.errors import ConfigError
from elastic.model_config import SHAPE, AttentionShape, ModelConfig, Rope

if TYPE_CHECKING:
    from elastic.nn.decoder import Block, Decoder

_EVEN = Constraint(holds=lambda value: value % 2 == 0, must="be even", why="RoPE turns pairs", fix="Add 1 to it.")
_STRETCH = Constraint(
    holds=lambda value: 1 <= value < math.inf,
    must="be finite and at least 1",
    why="it makes contexts longer",
    fix="Set it to 1 for none.",
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """The shape of a Llama, and what its relatives do otherwise."""

    separates_documents: ClassVar[bool] = True

    kind: str = "llama"
    dim: Annotated[int, POSITIVE, SHAPE] = 256
    num_heads: Annotated[int, POSITIVE, SHAPE] = 4
    num_kv_heads: Annotated[int, POSITIVE, SHAPE] = 4
    ffn_dim: Annotated[int, POSITIVE, SHAPE] = 768
    tied_head: Annotated[bool, SHAPE] = True
    """The output projection is the embedding, transposed."""
    head_dim: Annotated[int, NOT_NEGATIVE, _EVEN, SHAPE] = 0
    """Size of one attention head. 0: dim / num_heads."""
    qkv_bias: Annotated[bool, SHAPE] = False
    """Queries, keys and values have a bias (Qwen2)."""
    qk_norm: Annotated[bool, SHAPE] = False
    """Each query and key head is normalised before it is turned (Qwen3)."""
    rope_theta: Annotated[float, POSITIVE] = 10_000.0
    rope_scaling_factor: Annotated[float, _STRETCH] = 1.0
    """Slows down the slow rotations so many times, for contexts longer than trained on (Llama 3.1: 8). 1: none."""
    rope_low_freq_factor: Annotated[float, POSITIVE] = 1.0
    """Rotations that turn less than so often over `rope_original_positions` are slowed down in full."""
    rope_high_freq_factor: float = 4.0
    """Those that turn more than so often are left alone; between the two, in part."""
    rope_original_positions: Annotated[int, POSITIVE] = 8192
    no_rope_layer_interval: Annotated[int, NOT_NEGATIVE] = 0
    """The last of every so many layers has no positions (SmolLM3: 4). 0: all layers have."""
    norm_eps: Annotated[float, POSITIVE] = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_dim and (self.dim % self.num_heads or (self.dim // self.num_heads) % 2):
            raise ConfigError(
                f"model.dim={self.dim} cannot be cut into model.num_heads={self.num_heads} heads of an even size "
                f"(RoPE turns pairs). Set model.dim to a multiple of {2 * self.num_heads}, or set model.head_dim."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}: every "
                "key/value head serves the same number of query heads. Set it to a divisor."
            )
        if not self.rope_low_freq_factor < self.rope_high_freq_factor < math.inf:
            raise ConfigError(
                f"model.rope_high_freq_factor={self.rope_high_freq_factor} must be more than "
                f"model.rope_low_freq_factor={self.rope_low_freq_factor}: between the two lies the transition. "
                "Llama 3.1 has 4 and 1."
            )

    @property
    def head_size(self) -> int:
        """Size of one attention head, as given or as it follows from `dim`."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def attention(self) -> AttentionShape:
        """See `ModelConfig`."""
        return AttentionShape(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_size=self.head_size)

    @property
    def rope(self) -> Rope:
        """What turns queries and keys."""
        return Rope(
            head_size=self.head_size,
            theta=self.rope_theta,
            scaling_factor=self.rope_scaling_factor,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            original_positions=self.rope_original_positions,
        )

    @property
    def block_matrices(self) -> Mapping[str, tuple[int, int]]:
        """See `ModelConfig`."""
        query_dim, kv_dim = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return {
            "attention.query": (query_dim, self.dim),
            "attention.key": (kv_dim, self.dim),
            "attention.value": (kv_dim, self.dim),
            "attention.output": (self.dim, query_dim),
            "ffn.gate": (self.ffn_dim, self.dim),
            "ffn.up": (self.ffn_dim, self.dim),
            "ffn.down": (self.dim, self.ffn_dim),
        }

    @property
    def num_matrix_params(self) -> int:
        """See `ModelConfig`."""
        query_dim, kv_dim = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        attention = 2 * self.dim * (query_dim + kv_dim)
        return self.num_layers * (attention + 3 * self.dim * self.ffn_dim) + self.vocab_size * self.dim

    @property
    def num_params(self) -> int:
        """See `ModelConfig`."""
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_size if self.qkv_bias else 0
        gains = 2 * self.dim + (2 * self.head_size if self.qk_norm else 0)
        embedding = 0 if self.tied_head else self.vocab_size * self.dim
        return self.num_matrix_params + self.num_layers * (gains + biases) + self.dim + embedding


def build(config: Config) -> "Decoder":
    """Build the model on the current default device, normally meta; `elastic.nn.layers.init_weights` fills it."""
    from elastic.nn.decoder import Decoder

    return Decoder(
        (_build_block(config, index) for index in range(config.num_layers)),
        dim=config.dim,
        vocab_size=config.vocab_size,
        rope=config.rope,
        norm_eps=config.norm_eps,
        tied_head=config.tied_head,
    )


def _build_block(config: Config, index: int) -> "Block":
    from elastic.nn.decoder import Attention, Block, SwiGLU

    interval = config.no_rope_layer_interval
    attention = Attention(
        config.dim,
        config.attention,
        bias=config.qkv_bias,
        norm_eps=config.norm_eps if config.qk_norm else None,
        positions="none" if interval and (index + 1) % interval == 0 else "rotary",
    )
    return Block(config.dim, attention=attention, ffn=SwiGLU(config.dim, config.ffn_dim), norm_eps=config.norm_eps)
