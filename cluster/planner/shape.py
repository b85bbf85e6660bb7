"""What one block of a model computes and keeps for its backward, per token; the same for any family. Pure.

Letters: D width of the residual stream, Q all query heads, K all key (and value) heads, F inner width of the
feed-forward.
"""

from dataclasses import dataclass

from elastic.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Widths of a block with a gated feed-forward; one without a gate is taken for a gated one of as many
    parameters."""

    dim: int
    query_dim: int
    kv_dim: int
    ffn_dim: int
    num_heads: int
    head_size: int
    matrix_params: int
    """Of the block."""
    num_layers: int
    vocab_size: int
    num_params: int
    """Of the model."""

    @property
    def head_params(self) -> int:
        """Of the output layer."""
        return self.vocab_size * self.dim

    @property
    def root_params(self) -> int:
        """Of all that is in no block: embedding, last norm, output layer."""
        return self.num_params - self.num_layers * self.matrix_params

    @property
    def input_bytes(self) -> int:
        """Of a block's input in 2 bytes, all that is kept if the block is computed again."""
        return 2 * self.dim

    @property
    def _attention_bytes(self) -> int:
        """Queries, keys, values, what attention makes of them, and the sums (fp32) of each head."""
        return 2 * (self.query_dim + 2 * self.kv_dim) + 2 * self.query_dim + 4 * self.num_heads

    @property
    def joined_bytes(self) -> int:
        """Kept for the backward by a block whose layers were joined: of the feed-forward only gate and up.

        The input, its norm, attention, the sum, its norm, gate and up.
        """
        return 4 * 2 * self.dim + self._attention_bytes + 2 * 2 * self.ffn_dim

    @property
    def apart_bytes(self) -> int:
        """As above where they are apart: the compiler also keeps the product of gate and up."""
        return self.joined_bytes + 2 * self.ffn_dim

    @property
    def products_bytes(self) -> int:
        """Kept with recompute=selective: the input, and what products and attention made."""
        return 2 * self.dim + self._attention_bytes + 2 * self.dim + 2 * 2 * self.ffn_dim

    @property
    def keepable_bytes(self) -> int:
        """What recompute=budget may keep beside the input."""
        return self._attention_bytes + 4 * self.ffn_dim

    def count_budget_bytes(self, budget: float) -> float:
        """Return what recompute=budget keeps of at most so many bytes: whole parts, those that cost most time per byte.

        The input always; then attention with its queries, keys and values; then gate, and up. Measured: 1.5 B, half.
        """
        kept = float(self.input_bytes)
        for part in (self._attention_bytes, 2 * self.ffn_dim, 2 * self.ffn_dim):
            if kept + part > budget:
                break
            kept += part
        return kept

    @property
    def temporary_bytes(self) -> int:
        """Beside that, at the most, while the backward is in the block: gradients of the feed-forward's parts."""
        return 8 * self.ffn_dim + 4 * self.dim


def get_block_shape(model: ModelConfig) -> BlockShape:
    """Return the shape, from what every family says of itself; `dim` and `ffn_dim` if it has them."""
    attention = model.attention
    query_dim = attention.num_heads * attention.head_size if attention else 0
    kv_dim = attention.num_kv_heads * attention.head_size if attention else 0
    dim = int(getattr(model, "dim", query_dim or 1))
    block = (model.num_matrix_params - model.vocab_size * dim) // model.num_layers
    ffn_dim = int(getattr(model, "ffn_dim", 0)) or max(0, block - 2 * dim * (query_dim + kv_dim)) // (3 * dim)
    return BlockShape(
        dim=dim,
        query_dim=query_dim,
        kv_dim=kv_dim,
        ffn_dim=ffn_dim,
        num_heads=attention.num_heads if attention else 0,
        head_size=attention.head_size if attention else 0,
        matrix_params=block,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        num_params=model.num_params,
    )
