"""Reading, refusing and writing configurations."""

import dataclasses
import string
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.config import (
    CheckpointConfig,
    ClusterConfig,
    CostConfig,
    DataConfig,
    FaultConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from elastic.config_load import dump, load
from elastic.errors import ConfigError
from elastic.models.llama import Config as ModelConfig

text = st.text(st.characters(codec="utf-8", exclude_characters="$"), max_size=20).filter(lambda s: s != "???")
names = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12)
counts = st.integers(1, 10**9)
amounts = st.floats(1e-12, 1e12)
shares = st.floats(0, 1, exclude_max=True)


def literals(cls, name):
    return st.sampled_from(typing.get_args(typing.get_type_hints(cls)[name]))


@st.composite
def run_configs(draw):
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    schedule = draw(literals(OptimConfig, "schedule"))
    workers = sorted([draw(st.integers(1, 512)), draw(st.integers(1, 512))])
    strategy = draw(st.sampled_from(["auto", "ddp", "fsdp2", "hsdp"]))
    precision, recompute = draw(literals(RunConfig, "precision")), draw(literals(RunConfig, "recompute"))
    must_compile = recompute == "budget" or precision.startswith("fp8")
    return RunConfig(
        run=draw(names),
        storage="s" + draw(text),
        precision=precision,
        recompute=recompute,
        recompute_budget=draw(st.floats(0.01, 1)),
        attention=draw(literals(RunConfig, "attention")),
        cuda_graph=draw(literals(RunConfig, "cuda_graph")),
        strategy=strategy,
        shard_size=draw(st.integers(0, 64)) if strategy == "hsdp" else 0,
        compile=must_compile or draw(st.booleans()),
        device=draw(st.sampled_from(["auto", "cuda"])),
        model=ModelConfig(
            dim=heads * 2 * draw(st.integers(1, 512)),
            num_heads=heads,
            num_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4, 8) if heads % n == 0])),
            norm_eps=draw(amounts),
            tied_head=draw(st.booleans()),
        ),
        data=DataConfig(path=draw(text), seq_len=draw(counts), record_samples=draw(st.booleans())),
        train=TrainConfig(steps=draw(counts), global_batch=draw(st.integers(512, 10**6)), seed=draw(st.integers(0))),
        optim=OptimConfig(lr=draw(amounts), beta1=draw(shares), min_lr_ratio=draw(shares), schedule=schedule),
        checkpoint=CheckpointConfig(every_steps=draw(counts), keep_last=draw(counts)),
        cluster=ClusterConfig(min_workers=workers[0], max_workers=workers[1], gpus_per_worker=draw(st.integers(0, 1))),
        fault=FaultConfig(collective_timeout_s=draw(amounts), save_margin=draw(amounts)),
        cost=CostConfig(usd_per_gpu_hour=draw(amounts), price_file=draw(text)),
        wandb=WandbConfig(mode=draw(literals(WandbConfig, "mode")), project=draw(text), entity=draw(text)),
    )


@settings(max_examples=30)
@given(config=run_configs())
def test_what_is_written_reads_back_equal(config, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(dump(config), encoding="utf-8", newline="")
    assert load(file) == config


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


@settings(max_examples=30)
@given(config=run_configs())
def test_every_key_can_be_set_on_the_command_line(config, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "empty.yaml"
    file.write_text("")
    assert load(file, [f"{key}={value}" for key, value in leaves(dataclasses.asdict(config))]) == config


def write(tmp_path, yaml):
    file = tmp_path / "run.yaml"
    file.write_text(yaml)
    return file


def test_keys_left_out_keep_their_defaults(tmp_path):
    assert load(write(tmp_path, "")) == RunConfig()


def test_the_last_override_wins_over_the_file(tmp_path):
    config = load(write(tmp_path, "train: {steps: 7}"), ["train.steps=8", "train.steps=9"])
    assert config == RunConfig(train=TrainConfig(steps=9))


@pytest.mark.parametrize("typed", ["007", "1e3", "yes", "null", "2026-11-24"])
def test_text_typed_on_the_command_line_is_kept_as_typed(typed, tmp_path):
    assert load(write(tmp_path, ""), [f"run={typed}"]).run == typed


def test_an_override_value_may_hold_an_equals_sign(tmp_path):
    assert load(write(tmp_path, ""), ["data.path=a=b"]).data.path == "a=b"


def test_a_number_may_be_written_with_an_exponent_and_no_dot(tmp_path):
    assert load(write(tmp_path, "optim: {lr: 3e-4}")).optim.lr == 3e-4


BAD_OVERRIDES = {
    "train.stepss=3": ["train.stepss", "'3'", "Did you mean train.steps?"],
    "steps=3": ["steps", "'3'", "Did you mean train.steps?"],
    "trian.global_batch=3": ["trian.global_batch", "Did you mean train.global_batch?"],
    "zzz=3": ["zzz", "Keys are: run, storage,"],
    "=3": ["there is no such key"],
    "train.steps": ["'train.steps'", "no value", "train.steps=20"],
    "train.steps=": ["train.steps=''", "Integer", "train.steps=100"],
    "train.steps=abc": ["train.steps='abc'", "on the command line", "Integer", "train.steps=100"],
    "train.steps=1.5": ["train.steps='1.5'", "Integer"],
    "train.steps.more=1": ["train.steps.more", "no such key"],
    "train=5": ["train='5'", "whole section", "train.steps=100"],
    "compile=maybe": ["compile='maybe'", "bool", "compile=false"],
    "optim.lr=fast": ["optim.lr='fast'", "Float", "optim.lr=0.001"],
    "optim.lr=nan": ["optim.lr=nan", "finite"],
    "optim.lr=inf": ["optim.lr=inf", "finite"],
    "precision=bf17": ["precision='bf17'", "'fp32', 'tf32', 'bf16', 'fp16'", "precision=fp32"],
    "wandb.mode=off": ["wandb.mode='off'", "'offline', 'online', 'disabled'"],
    "run=${oc.env:HOME}": ["run='${oc.env:HOME}'", "refers", "run=$NAME"],
    "data.path=${train.steps}/x": ["data.path", "refers"],
    "data.path=???": ["data.path", "no value"],
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_refused_with_key_value_and_fix(override, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, ""), [override])
    for part in BAD_OVERRIDES[override]:
        assert part in str(caught.value)


BAD_FILES = {
    "train: {stepss: 3}": ["train.stepss=3", "run.yaml", "Did you mean train.steps?"],
    "train: {steps: abc}": ["train.steps='abc'", "run.yaml", "train.steps=100"],
    "train: {steps: true}": ["train.steps=True", "Integer"],
    "train: {steps: [1]}": ["train.steps=[1]", "Integer"],
    "train:\n  steps: ???": ["train.steps", "no value", "train.steps=100"],
    "train: {steps: }": ["train.steps", "no value", "train.steps=100"],
    "train:": ["train=None", "whole section"],
    "train: [1]": ["train=[1]", "whole section"],
    f"optim: {{lr: 1{'0' * 400}}}": ["optim.lr=1000", "optim.lr=0.001"],
    "run: 007": ["run=7", "int", "quotes"],
    "run: true": ["run=True", "bool", "quotes"],
    "run: ${oc.env:HOME}": ["run='${oc.env:HOME}'", "refers"],
    "1: 2": ["1=2", "no such key"],
    "train: {steps: 1}\ntrain: {seed: 1}": ["run.yaml", "duplicate key train", "each key once"],
    "train: [": ["run.yaml", "cannot be read", "line 2"],
    "\trun: x": ["run.yaml", "cannot be read", "line 1"],
    "run: !!python/object/apply:os.getcwd []": ["run.yaml", "cannot be read"],
    "- run": ["run.yaml", "list", "configs/demo.yaml"],
    "5": ["run.yaml", "cannot be read"],
    "\x00": ["run.yaml", "cannot be read"],
}


@pytest.mark.parametrize("yaml", BAD_FILES)
def test_a_bad_file_is_refused_with_key_value_and_fix(yaml, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, yaml))
    for part in BAD_FILES[yaml]:
        assert part in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load(file)


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no configuration file .*rum\.yaml\. Did you mean .*/run\.yaml\?"):
        load(tmp_path / "rum.yaml")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file.*such as configs/demo\.yaml"):
        load(tmp_path)


def test_the_environment_never_reaches_the_written_file(monkeypatch):
    monkeypatch.setenv("SOLVENT_SECRET", "hunter2")
    assert "hunter2" not in dump(RunConfig(data=DataConfig(path="${oc.env:SOLVENT_SECRET}")))
