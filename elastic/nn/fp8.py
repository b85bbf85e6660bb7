"""Products of the blocks' linear layers in fp8: twice the rate of bf16, for casts that the compiler fuses away.

Scales are computed anew for every product (dynamic scaling): per tensor (`fp8`, fastest) or per row (`fp8_rowwise`,
less rounding). The output layer, norms and attention stay in bf16. Source: torchao.float8, arXiv:2209.05433.
"""

from torch import nn

from elastic.config import Precision
from elastic.errors import ConfigError


def set_fp8(model: nn.Module, precision: Precision) -> None:
    """Let the linear layers of all blocks multiply in fp8, if the precision says so; parameters keep their names.

    Raises:
        ConfigError: torchao is not installed.
    """
    if precision not in ("fp8", "fp8_rowwise"):
        return
    try:
        from torchao.float8 import (  # noqa: PLC0415 # pyright: ignore[reportMissingImports] # extra `gpu`
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        raise ConfigError(
            f"precision={precision} needs the package torchao, which is not installed. "
            "pip install 'solvent[gpu]', or set precision=bf16."
        ) from error
    recipe = "tensorwise" if precision == "fp8" else "rowwise"
    for block in model.get_submodule("blocks").children():
        convert_to_float8_training(
            block,
            config=Float8LinearConfig.from_recipe_name(recipe),
            module_filter_fn=_is_trained,
        )


def _is_trained(layer: nn.Module, _name: str) -> bool:
    """Tell a layer from one whose weight went into a joined layer."""
    return isinstance(getattr(layer, "weight", None), nn.Parameter)
