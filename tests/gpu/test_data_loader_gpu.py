import pytest
import torch

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.data.corpus import open_corpus
from elastic.data.loader import Loader
from elastic.data.preparation.prepare import prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_batches_on_the_gpu_are_those_of_the_cpu(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(500)))
    prepare([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300, val_fraction=0)
    config = RunConfig(
        data=DataConfig(path=str(tmp_path / "out"), seq_len=16),
        train=TrainConfig(steps=20, global_batch=10, micro_batch=4),
    )
    batches = []
    for device in (torch.device("cpu"), torch.device("cuda", torch.cuda.device_count() - 1)):
        kwargs = {"rank": 0, "world_size": 1, "device": device, "start_step": 0}
        with Loader(open_corpus(config), **kwargs) as loader:
            batches.append([pair for _, batch in loader for pair in batch.microbatches])
        assert {tensor.device for pair in batches[-1] for tensor in pair} == {device}
    for host, device in zip(*batches, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(host, device, strict=True))
