"""Whether a run may go on from a checkpoint under the configuration it has now. No torch here.

Keys that shape the model or decide which samples a step takes must stay: with another value the state does not
fit, or samples would be lost or repeated. Other keys that decide what is computed may change, visibly: a longer
run, another learning rate. `data.path` is one of them, since the same folder may be mounted elsewhere.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from elastic.checkpoint.layout import Manifest
from elastic.config import RunConfig
from elastic.errors import CheckpointError, ConfigError

_SHAPE_KEYS = frozenset(
    f"model.{name}"
    for name in (
        *("kind", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "tied_head"),
        *("head_dim", "qkv_bias", "qk_norm"),
    )
)
_SAMPLE_KEYS = frozenset({"train.seed", "train.global_batch", "data.seq_len"})
_FREE_KEYS = frozenset({"precision", "data.path", "train.steps", "train.max_grad_norm"})  # and all of model, optim


def get_computing_config(config: RunConfig) -> dict[str, object]:
    """Return the keys that decide what is computed, whatever the world that computes it."""
    flat: dict[str, object] = {}
    for part, values in asdict(config).items():
        flat |= {f"{part}.{name}": v for name, v in values.items()} if isinstance(values, dict) else {part: values}
    chosen = _SHAPE_KEYS | _SAMPLE_KEYS | _FREE_KEYS
    return {key: value for key, value in flat.items() if key in chosen or key.startswith(("model.", "optim."))}


def get_config_hash(computing_config: Mapping[str, object]) -> str:
    """Return 16 hexadecimal digits that change with any value of `get_computing_config`."""
    return hashlib.sha256(json.dumps(computing_config, sort_keys=True).encode()).hexdigest()[:16]


def check_config(config: RunConfig, manifest: Manifest) -> dict[str, tuple[object, object]]:
    """Compare the configuration with the one that a checkpoint was made under.

    Returns:
        The keys that changed and may: ``{key: (value then, value now)}``.

    Raises:
        ConfigError: a key changed that must not.
    """
    now = get_computing_config(config)
    changed = {
        key: (manifest.config[key], now[key])
        for key in now.keys() & manifest.config.keys()
        if manifest.config[key] != now[key]
    }
    for keys, reason in (
        (_SHAPE_KEYS, "the saved weights have another shape"),
        (_SAMPLE_KEYS, "samples would be left out or repeated"),
    ):
        for key in sorted(keys & changed.keys()):
            then, value = changed[key]
            raise ConfigError(
                f"{key}={value}, but this run was trained with {key}={then} up to step {manifest.progress.step}: "
                f"{reason}. Set {key}={then} to resume, or start another run with run=<new name>."
            )
    return changed


def get_unsaved(live: Iterable[str], manifest: Manifest) -> set[str]:
    """Return which of the live tensors a checkpoint of step 0 leaves out: moments, which are zeros before any step."""
    if manifest.progress.step > 0:
        return set()
    return {name for name in live if name.startswith("optim.") and name not in manifest.tensors}


def check_tensors(live: Mapping[str, tuple[int, ...]], manifest: Manifest) -> None:
    """Compare the whole shapes of the live state with the saved ones, before any byte is loaded.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape, though the configuration fits: the code of
            the model or of the optimizer changed.
    """
    for name in sorted((live.keys() | manifest.tensors.keys()) - get_unsaved(live, manifest)):
        record = manifest.tensors.get(name)
        then, now = record and record.shape, live.get(name)
        if then != now:
            raise CheckpointError(
                f"{name} has the shape {now} now, but {then} in the checkpoint of step {manifest.progress.step} "
                "(None: no such tensor). The code of the model or optimizer changed: go back to the code that wrote "
                "it, or start another run with run=<new name>."
            )
