"""What a folder of `config.json` and safetensors holds, on any storage, checked before a tensor is read. No pickle.

Format: github.com/huggingface/safetensors (8 bytes length, a JSON header, the tensors); `model.safetensors.index.json`
names the file of each tensor when there are several.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from elastic import plugins
from elastic.checkpoint.format.sharding import ITEM_BYTES
from elastic.checkpoint.hf.families._base import Family, Pair
from elastic.checkpoint.hf.numbers import DTYPES, Dtype
from elastic.errors import ModelFolderError
from elastic.model_config import ModelConfig
from elastic.storage import Storage

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"

_TOKENIZER = "tokenizer.json"
_FAMILIES = "elastic.checkpoint.hf.families"
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where the bytes of a tensor lie."""

    key: str
    start: int
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many they are."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder that was found fit to be imported; the numbers themselves are not yet read."""

    storage: Storage
    model: ModelConfig
    pairs: tuple[Pair, ...]
    tensors: Mapping[str, StoredTensor]
    """By the folder's own names: exactly those of `pairs`."""

    @property
    def num_params(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(pair.shape) for pair in self.pairs)

    @property
    def num_bytes(self) -> int:
        """How many bytes they take as they are."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, tensor: StoredTensor, *, piece_bytes: int) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order, in pieces of at most so many (a multiple of 4).

        Raises:
            ModelFolderError: they cannot be read.
        """
        return read_pieces(self.storage, tensor, piece_bytes=piece_bytes)

    def read_tokenizer(self) -> bytes | None:
        """Return its `tokenizer.json`, if it has one."""
        return self.storage.read(_TOKENIZER) if self.storage.get_size(_TOKENIZER) is not None else None


def read_pieces(storage: Storage, tensor: StoredTensor, *, piece_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in order, in pieces of at most so many (a multiple of 4).

    Raises:
        ModelFolderError: they cannot be read.
    """
    for start in range(0, tensor.num_bytes, piece_bytes):
        piece = memoryview(bytearray(min(piece_bytes, tensor.num_bytes - start)))
        try:
            storage.read_into(tensor.key, tensor.start + start, piece)
        except OSError as error:
            raise explain_read(error, storage) from error
        yield piece


def get_families() -> dict[str, Family[Any]]:
    """Return the families that there are, by their `model_type`."""
    names = plugins.get_names(_FAMILIES)
    return {name: plugins.load(_FAMILIES, name, key="model_type").FAMILY for name in names}


def find_family(model: ModelConfig) -> tuple[str, Family[Any]]:
    """Return the `model_type` and the family that compute what the configuration describes.

    Raises:
        ModelFolderError: there is none.
    """
    families = get_families()
    for name, family in families.items():
        if family.fits(model):
            return name, family
    raise ModelFolderError(
        f"transformers has no class for this model ({model}): its options belong to different families. Those that can "
        f"be exported are {', '.join(families)}; which options each has stands in elastic/checkpoint/hf/families."
    )


def explain_read(error: OSError, storage: Storage) -> ModelFolderError:
    """Return what a storage's error means for the user who named the folder."""
    return ModelFolderError(
        f"{error.filename or storage.url} cannot be read ({error.strerror or error}). Check that the folder is there, "
        "whole and readable."
    )


def open_folder(storage: Storage) -> ModelFolder:
    """Check a folder from its headers: the shapes are right, nothing is missing, nothing would be left unused.

    Raises:
        ModelFolderError: it cannot be imported as it is.
    """
    try:
        return _open_folder(storage)
    except OSError as error:
        raise explain_read(error, storage) from error


def _open_folder(storage: Storage) -> ModelFolder:
    raw = read_json(
        storage, CONFIG, of="a Hugging Face model, as `save_pretrained` writes it or `hf download` fetches it"
    )
    families = get_families()
    family = families.get(str(raw.get("model_type")))
    if family is None:
        raise ModelFolderError(
            f"{storage.url}/{CONFIG}: model_type={raw.get('model_type')!r} is not one that is trained here. Import one "
            f"of {', '.join(families)}."
        )
    if raw.get("quantization_config"):
        raise ModelFolderError(
            f"{storage.url}/{CONFIG} has a quantization_config: the weights are rounded to a few bits, and training "
            "needs those they were made from. Import the unquantised model."
        )
    model = family.read_config(raw)
    stored = _read_headers(storage)
    pairs = family.get_pairs(model)
    _check_shapes(storage, pairs, stored)
    _check_unused(storage, pairs, stored)
    return ModelFolder(
        storage=storage, model=model, pairs=pairs, tensors={pair.theirs: stored[pair.theirs] for pair in pairs}
    )


def read_json(storage: Storage, key: str, *, of: str = "the model, whole") -> dict[str, Any]:
    """Return what a file of JSON says.

    Raises:
        ModelFolderError: it is not there, or no object.
    """
    try:
        content = json.loads(storage.read(key))
    except FileNotFoundError:
        raise ModelFolderError(f"{storage.url} has no {key}. Give the folder of {of}.") from None
    except ValueError as error:
        raise ModelFolderError(f"{storage.url}/{key} is not JSON ({error}). Fetch the model again.") from None
    if not isinstance(content, dict):
        raise ModelFolderError(f"{storage.url}/{key} is JSON, but not an object. Fetch the model again.")
    return cast(dict[str, Any], content)


def _read_headers(storage: Storage) -> dict[str, StoredTensor]:
    if storage.get_size(INDEX) is not None:
        keys = _read_index(storage)
    elif storage.get_size(WHOLE) is not None:
        keys = [WHOLE]
    else:
        pickles = [key for key in storage.list() if key.endswith(_PICKLES)]
        if pickles:
            raise ModelFolderError(
                f"{storage.url}/{pickles[0]} is a pickle, and loading one runs whatever code is in it. If you trust "
                "it, convert it once with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER), and import OTHER."
            )
        raise ModelFolderError(
            f"{storage.url} has neither {WHOLE} nor {INDEX}. Fetch the weights of the model as well."
        )
    tensors: dict[str, StoredTensor] = {}
    for key in keys:
        for name, tensor in read_header(storage, key):
            if name in tensors:
                raise ModelFolderError(
                    f"{storage.url}: {name} is in {tensors[name].key} and in {key}. Fetch the model again."
                )
            tensors[name] = tensor
    return tensors


def _read_index(storage: Storage) -> list[str]:
    weight_map = read_json(storage, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{storage.url}/{INDEX} has no weight_map. Fetch the model again.")
    keys = sorted({str(key) for key in cast(dict[str, object], weight_map).values()})
    for key in keys:
        # a name that leads elsewhere would let a stranger's index read any file of this machine
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", key):
            raise ModelFolderError(
                f"{storage.url}/{INDEX} names the file {key!r}, which is no safetensors file of this folder. Do not "
                "use a model that does so; fetch it again from where it was published."
            )
        if storage.get_size(key) is None:
            raise ModelFolderError(f"{storage.url} lacks {key}, which {INDEX} names. Fetch the model again.")
    return keys


def read_header(storage: Storage, key: str) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of one file; their bytes lie in it and do not overlap."""

    def fail(reason: str) -> ModelFolderError:
        return ModelFolderError(f"{storage.url}/{key} is damaged: {reason}. Fetch the model again.")

    size = storage.get_size(key) or 0
    header_bytes = int.from_bytes(storage.read(key, size=8), "little")
    data_start = 8 + header_bytes
    if size < 8 or header_bytes > _MAX_HEADER_BYTES or data_start > size:
        raise fail(f"a header of {header_bytes} bytes does not fit into {size}")
    try:
        header = json.loads(storage.read(key, start=8, size=header_bytes))
        entries = [
            (name, entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"its header cannot be read ({type(error).__name__}: {error})") from None
    end_before = 0
    for name, dtype, shape, start, end in sorted(entries, key=lambda entry: entry[3:]):
        if dtype not in DTYPES:
            raise ModelFolderError(
                f"{storage.url}/{key}: {name} is of type {dtype}, and weights that can be trained are one of "
                f"{', '.join(DTYPES)}. Import the unquantised model."
            )
        tensor = StoredTensor(key=key, start=data_start + start, dtype=dtype, shape=shape)
        if min(shape, default=0) < 0 or start != end_before or end - start != tensor.num_bytes:
            raise fail(f"{name} of shape {list(shape)} cannot lie at bytes {start} to {end}")
        end_before = end
        yield name, tensor
    if data_start + end_before != size:
        raise fail(f"it has {size} bytes instead of {data_start + end_before}")


def _check_shapes(storage: Storage, pairs: tuple[Pair, ...], stored: Mapping[str, StoredTensor]) -> None:
    missing = [pair.theirs for pair in pairs if pair.theirs not in stored]
    if missing:
        raise ModelFolderError(
            f"{storage.url} lacks {len(missing)} of {len(pairs)} tensors, {missing[0]} first: it is not all of what "
            f"{CONFIG} describes. Fetch the model again, or save all of it (a model with its head, merged adapters)."
        )
    for pair in pairs:
        if stored[pair.theirs].shape != pair.shape:
            raise ModelFolderError(
                f"{storage.url}: {pair.theirs} has the shape {list(stored[pair.theirs].shape)}, but {CONFIG} makes it "
                f"{list(pair.shape)}. The two are not of one model: fetch both again."
            )


def _check_unused(storage: Storage, pairs: tuple[Pair, ...], stored: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors that we would pass over, but for buffers that follow from the configuration."""
    used = {pair.theirs for pair in pairs}
    unused = sorted(name for name in stored.keys() - used if not name.endswith("rotary_emb.inv_freq") and name != _HEAD)
    if unused:
        raise ModelFolderError(
            f"{storage.url}: {len(unused)} tensors, {unused[0]} first, would be left unused, so the model would "
            f"compute something else. {CONFIG} and the weights are not of one model: fetch both again."
        )
    if _HEAD not in used and _HEAD in stored and not _are_equal(storage, stored[_HEAD], stored[_EMBEDDING]):
        raise ModelFolderError(
            f"{storage.url}: {_HEAD} differs from {_EMBEDDING}, but {CONFIG} says tie_word_embeddings=true. Set it to "
            "false there if the model has a head of its own."
        )


def _are_equal(storage: Storage, one: StoredTensor, other: StoredTensor, piece_bytes: int = 2**24) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.num_bytes, piece_bytes):
        size = min(piece_bytes, one.num_bytes - start)
        pieces = [storage.read(tensor.key, start=tensor.start + start, size=size) for tensor in (one, other)]
        if pieces[0] != pieces[1]:
            return False
    return True
