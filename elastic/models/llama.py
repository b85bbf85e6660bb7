"""Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Options of `ModelConfig` make it a Qwen2 (`qkv_bias`), a Qwen3 (`qk_norm`, `head_dim`) or a SmolLM3
(`no_rope_layer_interval`); the tensors map one to one onto those of Hugging Face's classes (`checkpoint/hf`).

Letters: B batch, S sequence, V vocabulary, D dim, H query heads, K key/value heads, E size of one head,
F inner size of the feed-forward.
Source: Llama 2, arXiv:2307.09288; Qwen2, arXiv:2407.10671; Qwen3, arXiv:2505.09388; layers without positions,
arXiv:2501.18795.
"""

from typing import Literal

import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor, nn

from elastic.attention import Attend
from elastic.config import ModelConfig
from elastic.fused import split_and_rotate, swiglu_down
from elastic.loss import sum_cross_entropy
from elastic.nn import Joinable, ResidualLinear, build_rope_tables, rotate


class Attention(Joinable):
    """Causal self-attention; each key/value head serves num_heads / num_kv_heads query heads."""

    def __init__(self, config: ModelConfig, *, positions: Literal["rotary", "none"]) -> None:
        super().__init__("query", "key", "value")
        self.head_dim, self.num_heads, self.num_kv_heads = config.head_size, config.num_heads, config.num_kv_heads
        self.positions = positions
        query_dim, kv_dim = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.query = nn.Linear(config.dim, query_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.attend = Attend()
        self.output = ResidualLinear(query_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        """Mix each position with the ones before it."""
        if self.joined is not None and self.positions == "rotary" and isinstance(self.query_norm, nn.Identity):
            parts = split_and_rotate(self.joined(x_BSD), cos_SE, sin_SE, self.num_heads, self.num_kv_heads)
            mixed_BHSE = self.attend(*(part.transpose(1, 2) for part in parts))
            return self.output(mixed_BHSE.transpose(1, 2).flatten(-2))
        query, key, value = (product.unflatten(-1, (-1, self.head_dim)) for product in self.project(x_BSD))
        query_BHSE, key_BKSE = self.query_norm(query).transpose(1, 2), self.key_norm(key).transpose(1, 2)
        if self.positions == "rotary":
            query_BHSE, key_BKSE = rotate(query_BHSE, cos_SE, sin_SE), rotate(key_BKSE, cos_SE, sin_SE)
        mixed_BHSE = self.attend(query_BHSE, key_BKSE, value.transpose(1, 2))
        return self.output(mixed_BHSE.transpose(1, 2).flatten(-2))


class FeedForward(Joinable):
    """SwiGLU (Source: arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("gate", "up")
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = ResidualLinear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Transform each position on its own."""
        if self.joined is not None and type(self.down) is ResidualLinear:  # fp8 puts another class there
            return swiglu_down(self.joined(x_BSD), self.down.weight)
        gate_BSF, up_BSF = self.project(x_BSD)
        return self.down(F.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, index: int) -> None:
        super().__init__()
        interval = config.no_rope_layer_interval
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, positions="none" if interval and (index + 1) % interval == 0 else "rotary")
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        """Return the residual stream after this block."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SE, sin_SE)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class Llama(nn.Module):
    """Token ids in, next-token logits or their loss out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, index=index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        # A tied head has no parameter of its own: one name in every state dict, nothing that could come untied.
        self.head = None if config.tied_head else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Return logits_BSV for int64 tokens_BS, or the summed nats of labels_BS; position s sees tokens 0 to s."""
        x_BSD = self.hidden(tokens_BS)
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(x_BSD, weight_VD) if labels_BS is None else sum_cross_entropy(x_BSD, weight_VD, labels_BS)

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """Return what the output layer reads."""
        cos_SE, sin_SE = build_rope_tables(self.config, tokens_BS.shape[1], device=tokens_BS.device)
        x_BSD = self.embed(tokens_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, cos_SE, sin_SE)
        return self.norm(x_BSD)


def build(config: ModelConfig) -> Llama:
    """Build the model on the current default device, normally meta; `elastic.nn.init_weights` gives it values."""
    return Llama(config)


def num_params(config: ModelConfig) -> int:
    """Count the trainable parameters; pure arithmetic."""
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_size if config.qkv_bias else 0
    gains = 2 * config.dim + (2 * config.head_size if config.qk_norm else 0)
    embedding = 0 if config.tied_head else config.vocab_size * config.dim
    return config.num_matrix_params + config.num_layers * (gains + biases) + config.dim + embedding


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return model FLOPs of forward and backward per target token; pure arithmetic.

    6 per matrix parameter and 12 * layers * heads * head size * seq_len for attention, not halved for the causal mask
    and without recomputation, so that the MFU compares with published ones (Source: PaLM, arXiv:2204.02311, appendix
    B).
    """
    query_dim = config.num_heads * config.head_size
    return 6.0 * config.num_matrix_params + 12.0 * config.num_layers * query_dim * seq_len
