"""SmolLM3: every fourth layer has no positions."""

from elastic.checkpoint.hf.families._decoder import DecoderFamily

FAMILY = DecoderFamily(
    architecture="SmolLM3ForCausalLM",
    no_rope_layer_interval=4,
    rope_theta=2_000_000.0,
    tied_head=True,
    max_positions=32_768,
)
