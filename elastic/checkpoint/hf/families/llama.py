"""Llama 1 to 3.3, and what is shaped like it: SmolLM, SmolLM2, TinyLlama."""

from elastic.checkpoint.hf.families._decoder import DecoderFamily

FAMILY = DecoderFamily(architecture="LlamaForCausalLM", max_positions=2048)
