"""Qwen3 (dense): normalised queries and keys, and heads of a size of their own."""

from elastic.checkpoint.hf.families._decoder import DecoderFamily

FAMILY = DecoderFamily(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128, max_positions=32_768)
