"""What every file of `elastic/checkpoint/hf/families` must keep to, beside the real classes of transformers."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from elastic import plugins
from elastic.checkpoint.hf.exporting import TokenizerFiles, write_folder
from elastic.checkpoint.hf.folder import find_family, get_families, open_folder
from elastic.checkpoint.hf.numbers import to_fp32
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.hf_tokenizer import read_tokenizer
from elastic.data.prepared.shards import open_dataset
from elastic.data.prepared.tokenizer import train_tokenizer
from elastic.storage import open_storage

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 7,
    "pad_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = [
    *(
        (name, {"tie_word_embeddings": tied})
        for name in plugins.get_names("elastic.checkpoint.hf.families")
        for tied in (True, False)
    ),
    ("llama", {"rope_parameters": LLAMA_3}),
    ("llama", {"head_dim": 16}),
    ("qwen3", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
]
TOKENS_BS = torch.randint(61, (3, 48), generator=torch.Generator().manual_seed(0))
NO_TOKENIZER = TokenizerFiles(files={}, token_ids={"bos_token_id": None, "eos_token_id": 7, "pad_token_id": None})


def build_theirs(model_type, options):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **options}))
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # gains and biases, which begin as ones and zeros
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return theirs.eval()


def load_ours(folder):
    """Fill one of our models, as a test may: with the whole of it in memory."""
    model = plugins.load("elastic.models", folder.model.kind, key="model.kind").build(folder.model)
    state = {}
    for pair in folder.pairs:
        tensor = folder.tensors[pair.theirs]
        numbers = np.concatenate([to_fp32(piece, tensor.dtype) for piece in folder.read(tensor, piece_bytes=1000)])
        state[pair.ours] = torch.from_numpy(numbers.reshape(pair.shape))
    model.load_state_dict(state)
    return model


class Weights:
    """The parameters of a model in pieces of odd sizes."""

    def __init__(self, model):
        self.state = model.state_dict()

    def read(self, name):
        numbers = self.state[name].detach().numpy().ravel()
        yield from (numbers[start : start + 1001] for start in range(0, len(numbers), 1001))


def export(model, config, out, **options):
    settings = {"tokenizer": NO_TOKENIZER, "seq_len": 48, "dtype": "fp32", "max_shard_bytes": 20_000, **options}
    return write_folder(open_storage(out), config, Weights(model), **settings)


@pytest.mark.parametrize(("model_type", "options"), CASES)
@torch.no_grad()
def test_a_model_computes_the_same_here_and_there_and_comes_back_bit_equal(model_type, options, tmp_path):
    theirs = build_theirs(model_type, options)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    folder = open_folder(open_storage(tmp_path / "theirs"))
    ours = load_ours(folder)
    torch.testing.assert_close(ours(TOKENS_BS), theirs(TOKENS_BS).logits, rtol=0, atol=1e-5)

    exported = export(ours, folder.model, tmp_path / "ours")
    assert exported.model_type == model_type and len(exported.files) > 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    torch.testing.assert_close(again(TOKENS_BS).logits, theirs(TOKENS_BS).logits, rtol=0, atol=0)
    given, came_back = theirs.config.to_dict(), again.config.to_dict()
    strange = {
        key
        for key in given.keys() & came_back.keys()
        if given[key] != came_back[key] and key not in ("_name_or_path", "initializer_range", "no_rope_layer_interval")
    }
    assert strange == set()


@pytest.mark.parametrize("model_type", plugins.get_names("elastic.checkpoint.hf.families"))
def test_the_names_and_shapes_of_a_family_are_those_of_our_model_and_of_no_other_family(model_type, tmp_path):
    build_theirs(model_type, {}).save_pretrained(tmp_path)
    folder = open_folder(open_storage(tmp_path))
    model = plugins.load("elastic.models", folder.model.kind, key="model.kind").build(folder.model)
    assert {pair.ours: pair.shape for pair in folder.pairs} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert [name for name, family in get_families().items() if family.fits(folder.model)] == [model_type]
    assert find_family(folder.model)[0] == model_type


def test_the_keys_that_transformers_4_wrote_mean_the_same(tmp_path):
    theirs = build_theirs("llama", {"rope_parameters": LLAMA_3})
    theirs.save_pretrained(tmp_path)
    now = open_folder(open_storage(tmp_path)).model
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_folder(open_storage(tmp_path)).model == now


@torch.no_grad()
def test_bf16_is_torchs_own_rounding_in_files_of_the_size_that_was_asked_for(tmp_path):
    theirs = build_theirs("llama", {})
    theirs.save_pretrained(tmp_path / "theirs")
    folder = open_folder(open_storage(tmp_path / "theirs"))
    exported = export(load_ours(folder), folder.model, tmp_path / "ours", dtype="bf16", max_shard_bytes=10_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter.bfloat16()), name
    sizes = [path.stat().st_size for path in (tmp_path / "ours").glob("model-*.safetensors")]
    # the tensors have 4 KiB at most, so that every file but the last is at least half full
    assert len(sizes) == exported.num_bytes // 10_000 + 1 or len(sizes) > 5
    assert max(sizes) < 10_000 + 2_000


def test_our_tokenizer_gives_the_same_ids_there(tmp_path):
    text = "In the beginning was the Word, and the Word was with God.\n\n  Naïve   tabs\tand emoji 🙂."
    (tmp_path / "text.txt").write_text(text * 20)
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", vocab_size=300, val_fraction=0.0, num_processes=1)
    tokenizer = read_tokenizer(tmp_path / "data")
    theirs = build_theirs("llama", {"vocab_size": 300})
    theirs.save_pretrained(tmp_path / "theirs")
    folder = open_folder(open_storage(tmp_path / "theirs"))
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eot_id, "pad_token_id": None}
    files = TokenizerFiles(files=tokenizer.files, token_ids=ids)
    export(load_ours(folder), folder.model, tmp_path / "ours", tokenizer=files)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    own = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    assert loaded(text)["input_ids"] == own.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token_id == tokenizer.eot_id


@pytest.mark.parametrize("bos_token", [None, "", "<extra>"])
def test_a_prompt_begins_there_as_the_documents_began_that_we_trained_on(tmp_path, bos_token):
    given = train_tokenizer(["In the beginning was the Word."], vocab_size=280)
    given.add_special_tokens(["<s>", "<extra>"])
    given.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", given.token_to_id("<s>"))]
    )
    given.save(str(tmp_path / "given.json"))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the Word was with God"}))
    folder = tmp_path / "data"
    info = prepare(
        [tmp_path / "text.jsonl"], folder, tokenizer=tmp_path / "given.json", bos_token=bos_token, val_fraction=0.0
    )
    row = open_dataset(folder).read("train", 0, info.train.num_tokens - 1).tolist()
    tokenizer = read_tokenizer(folder)
    (tmp_path / "hf").mkdir()
    for name, content in tokenizer.files.items():
        (tmp_path / "hf" / name).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("the Word was with God")["input_ids"] == row[:-1]
    assert loaded.eos_token_id == row[-1]
    assert loaded.bos_token_id == tokenizer.bos_id == (row[0] if bos_token != "" else None)
