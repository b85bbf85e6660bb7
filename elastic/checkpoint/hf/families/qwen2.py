"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from elastic.checkpoint.hf.families._decoder import DecoderFamily

FAMILY = DecoderFamily(architecture="Qwen2ForCausalLM", qkv_bias=True, max_positions=32_768)
