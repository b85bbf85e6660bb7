from dataclasses import replace

import pytest

from elastic.checkpoint.format.compat import check_config, check_tensors, get_computing_config, get_config_hash
from elastic.checkpoint.format.manifest import Manifest, TensorRecord
from elastic.config import ClusterConfig, OptimConfig, RunConfig, TrainConfig
from elastic.errors import CheckpointError, ConfigError
from elastic.models.llama import Config as ModelConfig
from elastic.ports import Progress

BEFORE = RunConfig()


def make_manifest():
    config = get_computing_config(BEFORE)
    return Manifest(
        progress=Progress(step=50, tokens=100),
        generation=1,
        world_size=1,
        device="cpu",
        mesh=(1,),
        config=config,
        config_hash=get_config_hash(config),
        tensors={"model.w": TensorRecord(dtype="F32", shape=(4, 2), chunks=())},
        generators={},
        files={},
        extra={},
    )


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (replace(BEFORE, model=ModelConfig(dim=512)), r"model\.dim=512.*model\.dim=256.*Set model\.dim=256"),
        (replace(BEFORE, model=ModelConfig(tied_head=False)), r"model\.tied_head=False.*another shape"),
        (replace(BEFORE, train=TrainConfig(seed=1)), r"train\.seed=1.*samples would be left out or repeated"),
        (replace(BEFORE, train=TrainConfig(global_batch=64)), r"train\.global_batch=64.*up to step 50"),
        (replace(BEFORE, data=replace(BEFORE.data, seq_len=128)), r"data\.seq_len=128"),
    ],
)
def test_a_change_that_breaks_exactness_is_refused_by_its_key(now, message):
    with pytest.raises(ConfigError, match=message):
        check_config(now, make_manifest())


def test_a_longer_run_or_another_learning_rate_may_go_on_and_is_reported():
    now = replace(BEFORE, train=TrainConfig(steps=200), optim=OptimConfig(lr=2e-3))
    assert check_config(now, make_manifest()) == {"train.steps": (100, 200), "optim.lr": (1e-3, 2e-3)}


def test_where_and_how_a_run_is_computed_does_not_matter():
    now = replace(
        BEFORE,
        run="other",
        strategy="ddp",
        recompute="full",
        cluster=ClusterConfig(max_workers=4),
        train=TrainConfig(micro_batch=1),
    )
    assert check_config(now, make_manifest()) == {}
    assert get_config_hash(get_computing_config(now)) == make_manifest().config_hash


@pytest.mark.parametrize("live", [{"model.w": (2, 4)}, {}, {"model.w": (4, 2), "model.b": (4,)}])
def test_a_state_of_another_shape_is_refused_by_its_name(live):
    with pytest.raises(CheckpointError, match=r"model\.[wb] has the shape"):
        check_tensors(live, make_manifest())
