"""Whether a run may go on from a checkpoint under the configuration it has now. No torch here.

Keys that shape the model or decide which samples a step takes must stay: with another value the state does not
fit, or samples would be lost or repeated. Other keys that decide what is computed may change, visibly: a longer
run, another learning rate. `data.path` is one of them, since the same folder may be mounted elsewhere; what lies there
must be what the run was trained on, unless `data.replace` names it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from elastic.checkpoint.format.manifest import Manifest
from elastic.config import OptimConfig, RunConfig
from elastic.errors import CheckpointError, ConfigError, DataError
from elastic.mixture import build_mixture, cut_description, describe_paths
from elastic.optim.lr_schedule import learning_rate
from elastic.ports import DataIdentity

_SAMPLE_KEYS = ("data.seq_len", "data.packing", "train.global_batch", "train.seed")
_FREE_KEYS = frozenset({"precision", "data.path", "train.steps", "train.max_grad_norm"})  # and all of model, optim


_TUNE = "tune"
_IDENTITY = "data.identity"
"""Not a key of a configuration, but of what a configuration came to."""
_MIXTURE = "data.mixture"
"""As above; without it there is one source."""
_IMPLIED = {"data.packing": "stream", "tune": "full"}
"""What was so before there was a key for it."""
_JUMP = 1.05
"""A learning rate that changes by more from one update to the next is told."""


def get_computing_config(config: RunConfig, data: DataIdentity | None = None) -> dict[str, object]:
    """Return the keys that decide what is computed, whatever the world that computes it, and which data it is."""
    flat: dict[str, object] = {}
    for part, values in asdict(config).items():
        flat |= {f"{part}.{name}": v for name, v in values.items()} if isinstance(values, dict) else {part: values}
    chosen = _FREE_KEYS.union(_SAMPLE_KEYS)
    results: dict[str, object] = {_IDENTITY: asdict(data)} if data else {}
    if mixture := build_mixture(config):
        results[_MIXTURE] = mixture.describe()
    prefixes = ("model.", "optim.")
    if config.tune != "full":
        chosen, prefixes = chosen | {_TUNE}, (*prefixes, "lora.")
    return results | {key: v for key, v in flat.items() if key in chosen or key.startswith(prefixes)}


def get_config_hash(computing_config: Mapping[str, object]) -> str:
    """Return 16 hexadecimal digits that change with any value of `get_computing_config`."""
    return hashlib.sha256(json.dumps(computing_config, sort_keys=True).encode()).hexdigest()[:16]


def get_data(manifest: Manifest) -> DataIdentity | None:
    """Return which data a checkpoint was trained on; None if an older version of Solvent wrote it."""
    fields = manifest.config.get(_IDENTITY)
    return DataIdentity(**fields) if fields else None


def check_resume(config: RunConfig, manifest: Manifest, *, data: DataIdentity | None) -> list[str]:
    """Compare what a run would go on with, configuration and data, with what its checkpoint was made under.

    Args:
        data: what `config.data.path` holds; None: it is not known.

    Returns:
        What the user should know, a line each.

    Raises:
        ConfigError: a key changed that must not.
        DataError: the data or the tokenizer is another one.
    """
    changed = check_config(config, manifest)
    step = manifest.progress.step
    remarks = [_check_data(config, manifest, data)] if data else []
    if not (data and config.data.replace == data.name):
        _check_mixture(config, manifest)
    if changed:
        changes = ", ".join(f"{key}: {then} -> {now}" for key, (then, now) in sorted(changed.items()))
        remarks.append(f"resuming at step {step} under a changed configuration: {changes}")
    if step and step >= config.train.steps:
        remarks.append(
            f"train.steps={config.train.steps}, and this run has done {step}: there is nothing left to train. Set "
            "train.steps to more to go on, or run=<new name> to begin anew."
        )
    elif changed:
        remarks.append(_compare_learning_rates(config, manifest))
    return [remark for remark in remarks if remark]


def _check_data(config: RunConfig, manifest: Manifest, now: DataIdentity) -> str:
    """Return what there is to tell.

    Raises:
        DataError: another data or tokenizer, and the configuration does not say that it is meant.
    """
    then, step = get_data(manifest), manifest.progress.step
    if then is None:
        return (
            f"the checkpoint of step {step} does not say which data it was trained on (an older version of Solvent "
            f"wrote it): {describe_paths(config.data)} is taken for it, and the next checkpoint says so"
        )
    differences: list[str] = []
    if now.tokenizer_sha256 != then.tokenizer_sha256:
        differences.append("its tokens are another tokenizer's, so that ids mean other text")
    if then.sources and now.sources:  # one that was added, or is not used any more, is for the mixture to judge
        both = sorted(name for name in then.sources.keys() & now.sources.keys())
        others = [name for name in both if then.sources[name] != now.sources[name]]
        differences += [f"other data in the source {name}" for name in others]
    elif then.train_sha256 and now.train_sha256 != then.train_sha256:
        differences.append(f"{now.train_tokens:,} other training tokens instead of {then.train_tokens:,}")
    if not then.sources and then.train_sha256 and now.val_sha256 != then.val_sha256:
        differences.append(f"{now.val_tokens:,} other validation tokens instead of {then.val_tokens:,}")
    if not differences:
        return ""
    what = "; ".join(differences)
    if config.data.replace == now.name:
        return f"from step {step} on this run goes on with other data, as data.replace={now.name} says: {what}"
    raise DataError(
        f"{describe_paths(config.data)} does not hold what this run was trained on up to step {step}: {what}. Samples "
        "would be left out or repeated in silence. Name the data of the run, start another run with "
        f"run=<new name>, or go on with this data on purpose with data.replace={now.name}."
    )


def _check_mixture(config: RunConfig, manifest: Manifest) -> None:
    """Refuse another mixture than that of the samples that the run has taken; from here on it may be another.

    Raises:
        ConfigError: it is another.
    """
    step, mixture = manifest.progress.step, build_mixture(config)
    then, now = manifest.config.get(_MIXTURE), mixture.describe() if mixture else None
    num_samples = step * config.train.global_batch
    if not step or cut_description(then, num_samples) == cut_description(now, num_samples):
        return
    advice = "Set them back"
    if then and mixture:
        weights = zip(mixture.names, mixture.phases[-1].weights, strict=True)
        keys = [f"from_step={step + 1}", *(f"weights.{name}={weight}" for name, weight in weights if weight)]
        later = " ".join(f"data.phases.NAME.{key}" for key in keys)
        advice = f"Set them back, and say from which step on they change ({later})"
    raise ConfigError(
        f"data.sources and data.phases say {_tell(now)}, but up to step {step} this run was trained on {_tell(then)}: "
        f"samples would be left out or repeated. {advice}, or start another run with run=<new name>."
    )


def _tell(description: Mapping[str, Any] | None) -> str:
    return f"a mixture of {description['phases']} (from this sample on, these weights)" if description else "data.path"


def _compare_learning_rates(config: RunConfig, manifest: Manifest) -> str:
    """Return a line if the next update's learning rate is far from the last one's."""
    then: Mapping[str, Any] = manifest.config
    tokens, step_tokens = manifest.progress.tokens, config.train.global_batch * config.data.seq_len
    optim = OptimConfig(**{k.removeprefix("optim."): v for k, v in then.items() if k.startswith("optim.")})
    total_tokens = then["train.steps"] * step_tokens
    last = learning_rate(optim, tokens, total_tokens)
    due = learning_rate(optim, tokens + step_tokens, total_tokens)
    now = learning_rate(config.optim, tokens + step_tokens, config.total_tokens)
    if max(now, due) <= _JUMP * min(now, due) or not last:
        return ""
    return (
        f"the learning rate jumps: {last:.3g} at the last update, {now:.3g} at the next one, where the schedule until "
        f"now (train.steps={then['train.steps']}) has {due:.3g}. A schedule is as long as train.steps: with another "
        "length or optim.lr it takes another course, from here on. Set them back if that is not meant."
    )


def check_config(config: RunConfig, manifest: Manifest) -> dict[str, tuple[object, object]]:
    """Compare the configuration with the one that a checkpoint was made under.

    Returns:
        The keys that changed and may: ``{key: (value then, value now)}``.

    Raises:
        ConfigError: a key changed that must not.
    """
    now, before = {**_IMPLIED, **get_computing_config(config)}, dict[str, object]({**_IMPLIED, **manifest.config})
    changed = {key: (before[key], now[key]) for key in now.keys() & before.keys() if before[key] != now[key]}
    for keys, reason in (
        ((_TUNE,), "other weights are trained and saved"),
        ([key for key in changed if key.startswith("lora.")], "the saved adapters have another shape, place or scale"),
        (config.model.get_shape_keys(), "the saved weights have another shape"),
        (_SAMPLE_KEYS, "samples would be left out or repeated"),
    ):
        for key in filter(changed.__contains__, keys):
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
