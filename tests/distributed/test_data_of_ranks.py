"""Data that is a path may be other data on another node."""

import json
from dataclasses import replace
from pathlib import Path

from elastic.data.preparation.prepare import prepare
from elastic.errors import DataError
from tests.distributed._loops import make_config, train_rank, write_data
from tests.distributed._ranks import run_ranks


def _train_on_the_data_of_the_node(rank: int, port: int, folder: Path):
    config = make_config(folder, "run", steps=2)
    config = replace(config, data=replace(config.data, path=str(folder / ("data", "other")[rank])))
    try:
        return train_rank(config, rank, port, world_size=2, attempt=1)
    except DataError as error:
        return str(error)


def test_ranks_whose_data_differs_refuse_to_train_together(tmp_path):
    write_data(tmp_path)
    lines = [json.dumps({"text": f"In the end was the number {n}. " * 4}) for n in range(200)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "b.jsonl"], tmp_path / "other", vocab_size=300, val_fraction=0.3)
    for rank, message in enumerate(run_ranks(_train_on_the_data_of_the_node, 2, tmp_path)):
        assert isinstance(message, str), "both trained"
        assert "holds other data on the node of rank 1 than on that of rank 0" in message
        assert f"is rank {rank}" in message
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
