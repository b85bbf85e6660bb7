"""What decoders are made of: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

A family (`elastic/models`) puts these together, and has what only it has in its own file.

Letters: B batch, S sequence, V vocabulary, D dim, H query heads, K key/value heads, E size of one head,
F inner size of the feed-forward.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor, nn

from elastic.model_config import AttentionShape, Rope
from elastic.nn.attention import Attend, separate
from elastic.nn.fused import split_and_rotate, swiglu_down
from elastic.nn.layers import Joinable, ResidualLinear, build_rope_tables, rotate
from elastic.nn.loss import sum_cross_entropy
from elastic.nn.precision import get_compute_dtype


class Attention(Joinable):
    """Causal self-attention; each key/value head serves num_heads / num_kv_heads query heads.

    Args:
        bias: of queries, keys and values.
        norm_eps: of the norm of each query and key head; None: they have none.
    """

    def __init__(
        self,
        dim: int,
        shape: AttentionShape,
        *,
        bias: bool = False,
        norm_eps: float | None = None,
        positions: Literal["rotary", "none"] = "rotary",
    ) -> None:
        super().__init__("query", "key", "value")
        self.head_dim, self.num_heads, self.num_kv_heads = shape.head_size, shape.num_heads, shape.num_kv_heads
        self.positions = positions
        query_dim, kv_dim = shape.num_heads * self.head_dim, shape.num_kv_heads * self.head_dim
        self.query = nn.Linear(dim, query_dim, bias=bias)
        self.key = nn.Linear(dim, kv_dim, bias=bias)
        self.value = nn.Linear(dim, kv_dim, bias=bias)
        self.query_norm = nn.Identity() if norm_eps is None else nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.key_norm = nn.Identity() if norm_eps is None else nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.attend = Attend()
        self.output = ResidualLinear(query_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor, documents: Tensor | None = None) -> Tensor:
        """Mix each position with the ones before it, of its own document (`elastic.nn.attention.separate`) only."""
        if self.joined is not None and self.positions == "rotary" and isinstance(self.query_norm, nn.Identity):
            parts = split_and_rotate(self.joined(x_BSD), cos_SE, sin_SE, self.num_heads, self.num_kv_heads)
            mixed_BHSE = self.attend(*(part.transpose(1, 2) for part in parts), documents)
            return self.output(mixed_BHSE.transpose(1, 2).flatten(-2))
        query, key, value = (product.unflatten(-1, (-1, self.head_dim)) for product in self.project(x_BSD))
        query_BHSE, key_BKSE = self.query_norm(query).transpose(1, 2), self.key_norm(key).transpose(1, 2)
        if self.positions == "rotary":
            query_BHSE, key_BKSE = rotate(query_BHSE, cos_SE, sin_SE), rotate(key_BKSE, cos_SE, sin_SE)
        mixed_BHSE = self.attend(query_BHSE, key_BKSE, value.transpose(1, 2), documents)
        return self.output(mixed_BHSE.transpose(1, 2).flatten(-2))


class SwiGLU(Joinable):
    """Feed-forward with a gate (Source: arXiv:2002.05202)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__("gate", "up")
        self.gate = nn.Linear(dim, inner_dim, bias=False)
        self.up = nn.Linear(dim, inner_dim, bias=False)
        self.down = ResidualLinear(inner_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Transform each position on its own."""
        if self.joined is not None and type(self.down) is ResidualLinear:  # fp8 puts another class there
            return swiglu_down(self.joined(x_BSD), self.down.weight)
        gate_BSF, up_BSF = self.project(x_BSD)
        return self.down(F.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Args:
        ffn: takes x_BSD to as much; a `ResidualLinear` comes last in it.
    """

    def __init__(self, dim: int, *, attention: Attention, ffn: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn = ffn

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the residual stream after this block."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SE, sin_SE, documents)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class Decoder(nn.Module):
    """Token ids in, next-token logits or their loss out."""

    def __init__(
        self, blocks: Iterable[Block], *, dim: int, vocab_size: int, rope: Rope, norm_eps: float, tied_head: bool
    ) -> None:
        super().__init__()
        self.rope = rope
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        # A tied head has no parameter of its own: one name in every state dict, nothing that could come untied.
        self.head = None if tied_head else nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None, borders_N: Tensor | None = None) -> Tensor:
        """Return logits_BSV for int64 tokens_BS, or the summed nats of labels_BS; position s sees tokens 0 to s.

        Args:
            borders_N: where documents begin in all sequences on end (`elastic.nn.attention.separate`): then a position
                sees those of its own document. None: each sequence is one.
        """
        x_BSD = self.hidden(tokens_BS, borders_N)
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(x_BSD, weight_VD) if labels_BS is None else sum_cross_entropy(x_BSD, weight_VD, labels_BS)

    def hidden(self, tokens_BS: Tensor, borders_N: Tensor | None = None) -> Tensor:
        """Return what the output layer reads."""
        x_BSD = self.embed(tokens_BS)
        if borders_N is None:
            tables = build_rope_tables(self.rope, torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
        else:
            positions_BS, documents = separate(borders_N, tokens_BS, get_compute_dtype(x_BSD))
            tables = (*build_rope_tables(self.rope, positions_BS), documents)
        for block in self.blocks:
            x_BSD = block(x_BSD, *tables)
        return self.norm(x_BSD)
