"""What every file of this folder provides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from elastic.model_config import ModelConfig

_C = TypeVar("_C", bound=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One tensor under both names; the numbers are the same, in the same order."""

    ours: str
    """As in the model's `state_dict`."""
    theirs: str
    shape: tuple[int, ...]


class Family(Protocol[_C]):
    """How one `model_type` corresponds to the `Config` of a family in `elastic/models`."""

    def read_config(self, raw: Mapping[str, Any]) -> _C:
        """Return what a `config.json` describes.

        Raises:
            ModelFolderError: it describes something that we would compute differently.
        """
        ...

    def fits(self, config: ModelConfig) -> bool:
        """Return whether this family computes what the configuration describes; at most one family does."""
        ...

    def write_config(self, config: _C) -> dict[str, object]:
        """Return the `config.json` of a configuration that fits, but for `model_type`, positions, tokens and dtype."""
        ...

    def get_pairs(self, config: _C) -> tuple[Pair, ...]:
        """Return all tensors, in the order in which a folder has them."""
        ...
