"""Folders that cannot be imported say why, before a number of them is read; what is exported is cut as asked."""

import json
import math
import struct
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elastic.checkpoint.format.sharding import ITEM_BYTES
from elastic.checkpoint.hf.exporting import plan_shards
from elastic.checkpoint.hf.families._base import Pair
from elastic.checkpoint.hf.folder import find_family, get_families, open_folder
from elastic.checkpoint.hf.numbers import from_fp32, to_fp32
from elastic.errors import ModelFolderError
from elastic.storage import open_storage
from tests.contract._hf import MODEL, write_hf_folder

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


def write(path, model=MODEL):
    """Write a folder of three files."""
    write_hf_folder(path, model)
    assert (path / FIRST).exists()
    return path


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))


def read_header(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def edit_header(path, change):
    header, data = read_header(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refuse(path):
    before = sorted(path.rglob("*"))
    with pytest.raises(ModelFolderError) as caught:
        open_folder(open_storage(path))
    assert sorted(path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "mamba"}, ("model_type='mamba'", "Import one of llama, qwen2, qwen3, smollm3")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("is not a language model", "LlamaForCausalLM")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "Import the unquantised model")),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "have hidden_act='silu'")),
        ({"attention_bias": True}, ("attention_bias=True",)),
        ({"mlp_bias": True}, ("mlp_bias=True",)),
        ({"use_sliding_window": True}, ("use_sliding_window=True",)),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types has sliding_attention",)),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("yarn", "rope_type default or llama3")),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, ("linear",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
        ({"hidden_size": ...}, ("config.json has no hidden_size",)),
        ({"num_key_value_heads": 3}, ("cannot be built here", "model.num_kv_heads=3")),
        ({"hidden_size": "8"}, ("hidden_size='8' should be of type int",)),
        ({"rope_parameters": {"factor": True}}, ("factor=True should be of type float",)),
        ({"intermediate_size": 13}, ("mlp.gate_proj.weight has the shape [12, 8]", "makes it [13, 8]")),
        ({"num_hidden_layers": 3}, ("lacks 9 of 30 tensors", "model.layers.2.input_layernorm.weight first")),
        ({"num_hidden_layers": 1}, ("9 tensors, model.layers.1.input_layernorm.weight first, would be left unused",)),
    ],
)
def test_a_model_that_we_would_compute_differently_is_refused_by_its_key(tmp_path, changes, parts):
    edit_json(write(tmp_path / "m") / "config.json", **changes)
    message = refuse(tmp_path / "m")
    assert [part for part in parts if part not in message] == [], message


def test_layers_without_positions_must_follow_an_interval(tmp_path):
    folder = write(tmp_path / "m", replace(MODEL, no_rope_layer_interval=2))
    edit_json(folder / "config.json", no_rope_layers=[0, 1])
    assert "no_rope_layers=[0, 1] follows no interval" in refuse(folder)


LLAMA_3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
PUBLISHED = {
    ("llama", "SmolLM2-135M", 134_515_008): (576, 1536, 30, 9, 3, 49_152, {"tie_word_embeddings": True}),
    ("llama", "Llama-3.1-8B", 8_030_261_248): (4096, 14_336, 32, 32, 8, 128_256, {"rope_theta": 5e5}),
    ("llama", "Llama-3.2-1B", 1_235_814_400): (
        *(2048, 8192, 16, 32, 8, 128_256),
        {"tie_word_embeddings": True, "head_dim": 64, "rope_scaling": {**LLAMA_3, "rope_type": "llama3"}},
    ),
    ("qwen2", "Qwen2.5-0.5B", 494_032_768): (896, 4864, 24, 14, 2, 151_936, {"tie_word_embeddings": True}),
    ("qwen3", "Qwen3-0.6B", 596_049_920): (1024, 3072, 28, 16, 8, 151_936, {"tie_word_embeddings": True}),
    ("smollm3", "SmolLM3-3B", 3_075_098_624): (2048, 11_008, 36, 16, 4, 128_256, {}),
}


@pytest.mark.parametrize(("published", "shape"), PUBLISHED.items(), ids=lambda value: value[1])
def test_published_models_have_as_many_parameters_as_their_hub_counts(published, shape):
    model_type, _, num_params = published
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    family = get_families()[model_type]
    model = family.read_config({**dict(zip((*keys, "vocab_size"), shape, strict=False)), **shape[-1]})
    assert model.num_params == num_params
    assert sum(math.prod(pair.shape) for pair in family.get_pairs(model)) == num_params


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("rope_type"), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_no_value_of_any_key_of_a_configuration_does_more_than_be_refused(tmp_path, data):
    folder = tmp_path / "m"
    if not folder.exists():
        write(folder, replace(MODEL, rope_scaling_factor=8.0, no_rope_layer_interval=2))
        (folder / "config.json").rename(tmp_path / "config.json")
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in data.draw(st.sets(st.sampled_from(sorted(raw)), min_size=1, max_size=2)):
        raw[key] = data.draw(JSON)
    (folder / "config.json").write_text(json.dumps(raw))
    with suppress(ModelFolderError):
        open_folder(open_storage(folder))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".x.safetensors", "x.bin"])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    folder = write(tmp_path / "m")
    (tmp_path / "secret.safetensors").write_bytes((folder / FIRST).read_bytes())
    edit_json(folder / INDEX, weight_map={"model.embed_tokens.weight": name})
    assert f"names the file {name!r}, which is no safetensors file of this folder" in refuse(folder)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    folder = write(tmp_path / "m")
    for path in folder.glob("model*"):
        path.unlink()
    assert "has neither model.safetensors nor" in refuse(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pytorch_model.bin is a pickle" in (message := refuse(folder)) and "save_pretrained(OTHER)" in message


def test_damage_is_found_in_the_headers(tmp_path):
    def refuse_after(change):
        edit_header(write(tmp_path / "m") / FIRST, change)
        message = refuse(tmp_path / "m")
        for path in (tmp_path / "m").iterdir():
            path.unlink()
        return message

    def set_embedding(**values):
        return lambda header: header["model.embed_tokens.weight"].update(values)

    assert "of type F8_E4M3" in refuse_after(set_embedding(dtype="F8_E4M3"))
    assert "cannot lie at bytes 0 to 511" in refuse_after(set_embedding(data_offsets=[0, 511]))
    assert "cannot lie at bytes -1 to 511" in refuse_after(set_embedding(data_offsets=[-1, 511]))
    assert "its header cannot be read (OverflowError" in refuse_after(set_embedding(shape=[float("inf")]))
    assert "of shape [-16, -8] cannot" in refuse_after(set_embedding(shape=[-16, -8]))
    assert "has the shape [8, 16]" in refuse_after(set_embedding(shape=[8, 16]))
    assert "lacks 1 of 21 tensors" in refuse_after(lambda h: h.update(x=h.pop("model.embed_tokens.weight")))
    folder = write(tmp_path / "m")
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-1])
    assert "is damaged: it has" in refuse(folder)
    (folder / FIRST).unlink()
    assert f"lacks {FIRST}" in refuse(folder)


def test_a_tied_head_may_be_stored_twice_but_not_differently(tmp_path):
    folder = write(tmp_path / "m")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert "head.weight" not in {pair.ours for pair in open_folder(open_storage(folder)).pairs}
    last = sorted(folder.glob("model-*"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"\x01")  # of the head, the last tensor
    assert "lm_head.weight differs from model.embed_tokens.weight" in refuse(folder)


@given(data=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
def test_no_file_whatever_its_bytes_does_more_than_be_refused(tmp_path, data):
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        write(folder)
        (folder / INDEX).unlink()
    size = struct.pack("<Q", max(len(data) - 8, 0)) if data[:1] > b"\x7f" else b""
    (folder / "model.safetensors").write_bytes(size + data)
    refuse(folder)


def test_a_model_that_no_class_of_transformers_computes_is_not_exported(tmp_path):
    with pytest.raises(ModelFolderError, match="transformers has no class for this model"):
        find_family(replace(MODEL, qk_norm=True, qkv_bias=True))


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    write(tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ModelFolderError, match="is not empty"):
        write(tmp_path / "m")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    limit=st.integers(1, 200),
    dtype=st.sampled_from(["fp32", "bf16"]),
)
def test_files_hold_each_tensor_once_in_order_and_no_more_than_was_asked_for(sizes, limit, dtype):
    pairs = [Pair(ours=f"{i}", theirs=f"{i}", shape=(size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(pairs, dtype=dtype, max_shard_bytes=limit)
    assert [pair for shard in shards for pair in shard] == pairs
    item_bytes = {"fp32": 4, "bf16": 2}[dtype]
    used = [sum(item_bytes * pair.shape[0] for pair in shard) for shard in shards]
    assert all(num_bytes <= limit or len(shard) == 1 for num_bytes, shard in zip(used, shards, strict=True))
    # and no two neighbours would have fitted into one
    firsts = [item_bytes * shard[0].shape[0] for shard in shards[1:]]
    assert all(before + first > limit for before, first in zip(used, firsts, strict=False))


@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=50))
@example(bits=[0x7F800001, 0x7F7FFFFF, 0x3F808000, 0x3F818000])  # a NaN by its last bit, an overflow, ties
def test_bf16_is_rounded_as_torch_rounds_it_whatever_the_bits(bits):
    numbers = np.array(bits, np.uint32).view(np.float32)
    expected = torch.from_numpy(numbers.copy()).bfloat16()
    got = torch.frombuffer(bytearray(from_fp32(numbers, "BF16")) or bytearray(2), dtype=torch.bfloat16)[: len(bits)]
    assert torch.equal(got.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(got[keep].view(torch.int16), expected[keep].view(torch.int16))


@given(data=st.binary(max_size=64))
@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_numbers_become_fp32_exactly(name, dtype, data):
    data = data[: len(data) // ITEM_BYTES[name] * ITEM_BYTES[name]]
    expected = torch.frombuffer(bytearray(data), dtype=dtype).float() if data else torch.empty(0)
    np.testing.assert_array_equal(to_fp32(data, name), expected.numpy())
