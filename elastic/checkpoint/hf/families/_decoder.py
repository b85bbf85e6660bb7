"""The families that `elastic/models/llama.py` computes; they differ in a few options.

Source: configuration_*.py and modeling_*.py of each family in transformers 5.23, and modeling_rope_utils.py there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.hf.families._base import Pair
from elastic.errors import ConfigError, ModelFolderError
from elastic.model_config import ModelConfig
from elastic.models.llama import Config

_MUST_BE: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}
"""Keys whose other values would be computed differently; left out, they have these."""

_NUMBERS = ("rope_theta", "rms_norm_eps", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor")
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), (int,)),
    **dict.fromkeys(("intermediate_size", "vocab_size", "head_dim", "max_position_embeddings"), (int,)),
    **dict.fromkeys(("no_rope_layer_interval", "original_max_position_embeddings"), (int,)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(("architectures", "layer_types", "no_rope_layers"), (list,)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict,)),
    "tie_word_embeddings": (bool,),
}
"""Of the keys that are read, here or in the rotary parameters."""


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """See `Family`."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    no_rope_layer_interval: int = 0
    """0: all layers have positions; else the interval of a `config.json` that does not name one."""
    head_dim: int = 0
    """Of a `config.json` that does not name one. 0: hidden_size / num_attention_heads."""
    rope_theta: float = 10_000.0
    tied_head: bool = False
    max_positions: int

    def read_config(self, raw: Mapping[str, Any]) -> Config:
        """See `Family`."""
        given = _take(raw)
        self._check_computed(given)
        try:
            dim, num_heads = given["hidden_size"], given["num_attention_heads"]
            head_dim = given.get("head_dim", self.head_dim)
            return Config(
                dim=dim,
                num_layers=given["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=given.get("num_key_value_heads", num_heads),
                ffn_dim=given["intermediate_size"],
                vocab_size=given["vocab_size"],
                tied_head=given.get("tie_word_embeddings", self.tied_head),
                head_dim=0 if head_dim * num_heads == dim else head_dim,
                qkv_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
                **self._read_rope(given),
                no_rope_layer_interval=self._read_no_rope_layers(given),
                max_positions=given.get("max_position_embeddings", self.max_positions),
                norm_eps=given.get("rms_norm_eps", 1e-6),
            )
        except KeyError as error:
            raise ModelFolderError(
                f"config.json has no {error.args[0]}, without which the shape of the model is unknown. Take the "
                "config.json that the model was published with."
            ) from None
        except ConfigError as error:
            raise ModelFolderError(
                f"config.json describes a model that cannot be built here: {error} Import another model."
            ) from error

    def fits(self, config: ModelConfig) -> bool:
        """See `Family`."""
        return (
            type(config) is Config  # one that derives from it computes something else
            and config.qkv_bias == self.qkv_bias
            and config.qk_norm == self.qk_norm
            and (config.no_rope_layer_interval > 0) == (self.no_rope_layer_interval > 0)
            # transformers checks this for some of its families, whatever their head_dim
            and (config.qk_norm or config.dim % config.num_heads == 0)
        )

    def write_config(self, config: Config) -> dict[str, object]:
        """See `Family`."""
        scaling: dict[str, object] = {"rope_type": "default"}
        if config.rope_scaling_factor != 1:
            scaling = {
                "rope_type": "llama3",
                "factor": config.rope_scaling_factor,
                "low_freq_factor": config.rope_low_freq_factor,
                "high_freq_factor": config.rope_high_freq_factor,
                "original_max_position_embeddings": config.rope_original_positions,
            }
        no_rope: dict[str, object] = {}
        if config.no_rope_layer_interval:
            has_rope = [i % config.no_rope_layer_interval != 0 for i in range(1, config.num_layers + 1)]
            no_rope = {
                "no_rope_layer_interval": config.no_rope_layer_interval,
                "no_rope_layers": list(map(int, has_rope)),
            }
        return {
            "architectures": [self.architecture],
            "hidden_act": "silu",
            "hidden_size": config.dim,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_size,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tied_head,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "attention_dropout": 0.0,
            "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
            # where transformers 4 and those who copied it look
            "rope_theta": config.rope_theta,
            "rope_scaling": None if config.rope_scaling_factor == 1 else scaling,
            **no_rope,
        }

    def get_pairs(self, config: Config) -> tuple[Pair, ...]:
        """See `Family`."""
        return tuple(self._get_pairs(config))

    def _get_pairs(self, config: Config) -> Iterator[Pair]:
        query_dim, kv_dim = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        layer: dict[tuple[str, str], tuple[int, ...]] = {
            ("attention_norm.weight", "input_layernorm.weight"): (config.dim,)
        }
        for ours, theirs, dim in (
            ("query", "q_proj", query_dim),
            ("key", "k_proj", kv_dim),
            ("value", "v_proj", kv_dim),
        ):
            layer[f"attention.{ours}.weight", f"self_attn.{theirs}.weight"] = (dim, config.dim)
            if self.qkv_bias:
                layer[f"attention.{ours}.bias", f"self_attn.{theirs}.bias"] = (dim,)
        if self.qk_norm:
            layer["attention.query_norm.weight", "self_attn.q_norm.weight"] = (config.head_size,)
            layer["attention.key_norm.weight", "self_attn.k_norm.weight"] = (config.head_size,)
        layer |= {
            ("attention.output.weight", "self_attn.o_proj.weight"): (config.dim, query_dim),
            ("ffn_norm.weight", "post_attention_layernorm.weight"): (config.dim,),
            ("ffn.gate.weight", "mlp.gate_proj.weight"): (config.ffn_dim, config.dim),
            ("ffn.up.weight", "mlp.up_proj.weight"): (config.ffn_dim, config.dim),
            ("ffn.down.weight", "mlp.down_proj.weight"): (config.dim, config.ffn_dim),
        }
        embedding_shape = (config.vocab_size, config.dim)
        yield Pair(ours="embed.weight", theirs="model.embed_tokens.weight", shape=embedding_shape)
        for index in range(config.num_layers):
            for (ours, theirs), shape in layer.items():
                yield Pair(ours=f"blocks.{index}.{ours}", theirs=f"model.layers.{index}.{theirs}", shape=shape)
        yield Pair(ours="norm.weight", theirs="model.norm.weight", shape=(config.dim,))
        if not config.tied_head:
            yield Pair(ours="head.weight", theirs="lm_head.weight", shape=embedding_shape)

    def _check_computed(self, given: Mapping[str, Any]) -> None:
        if self.architecture not in given.get("architectures", [self.architecture]):
            raise ModelFolderError(
                f"config.json: architectures={given['architectures']} is not a language model that we train. "
                f"Import a folder of {self.architecture}."
            )
        for key, value in _MUST_BE.items():
            if given.get(key, value) != value:
                raise ModelFolderError(
                    f"config.json: {key}={given[key]!r}, but the models here have {key}={value!r} and would compute "
                    "something else from these weights. Import a model without it."
                )
        other = set(given.get("layer_types", ())) - {"full_attention"}
        if other:
            raise ModelFolderError(
                f"config.json: layer_types has {', '.join(sorted(map(str, other)))}, but attention here is over the "
                "whole sequence. Import a model whose layers are all full_attention."
            )

    def _read_rope(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rotary keys of `Config`; transformers 4 wrote `rope_scaling`, 5 writes `rope_parameters`."""
        rope = {**_take(given.get("rope_scaling", {})), **_take(given.get("rope_parameters", {}))}
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = {"rope_theta": rope.get("rope_theta", given.get("rope_theta", self.rope_theta))}
        if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "llama3"):
            raise ModelFolderError(
                f"config.json: the rotary positions {rope} are of a kind that we do not compute. Import a model with "
                "rope_type default or llama3."
            )
        if kind == "default":
            return theta
        return {
            **theta,
            "rope_scaling_factor": rope["factor"],
            "rope_low_freq_factor": rope["low_freq_factor"],
            "rope_high_freq_factor": rope["high_freq_factor"],
            "rope_original_positions": rope["original_max_position_embeddings"],
        }

    def _read_no_rope_layers(self, given: Mapping[str, Any]) -> int:
        """Return how often a layer without positions comes; transformers goes by the list if there is one."""
        if not self.no_rope_layer_interval:
            return 0
        interval: int = given.get("no_rope_layer_interval", self.no_rope_layer_interval)
        has_rope = [bool(flag) for flag in given.get("no_rope_layers", ())][: given["num_hidden_layers"]]
        if has_rope:
            interval = has_rope.index(False) + 1 if False in has_rope else 0
            if interval and has_rope != [i % interval != 0 for i in range(1, len(has_rope) + 1)]:
                raise ModelFolderError(
                    f"config.json: no_rope_layers={given['no_rope_layers']} follows no interval, and here every n-th "
                    "layer is without positions. Import a model of which that is true."
                )
        return interval


def _take(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have a value, once those that are read have one of the right type."""
    given = {key: value for key, value in raw.items() if value is not None}
    for key, types in _TYPES.items():
        if key in given and type(given[key]) not in types:
            raise ModelFolderError(
                f"config.json: {key}={given[key]!r} should be of type {types[-1].__name__}. Take the config.json "
                "that the model was published with."
            )
    return given
