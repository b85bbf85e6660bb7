"""Which library carries the collectives of a world."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from elastic.world import _choose_backend


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [([""], "gloo"), (["", ""], "gloo"), (["a"], "nccl"), (["a", "b"], "nccl"), (["a", "b", "a"], "gloo")],
    ids=["a CPU", "CPUs", "a GPU", "GPUs", "GPUs of which two ranks share one"],
)
def test_nccl_carries_them_between_gpus_unless_ranks_share_one_and_all_ranks_know(gpus, backend):
    store = dist.HashStore()
    with ThreadPoolExecutor(len(gpus)) as ranks:
        chosen = [
            ranks.submit(_choose_backend, store, gpu, rank=rank, world_size=len(gpus)) for rank, gpu in enumerate(gpus)
        ]
        assert [choice.result(timeout=30) for choice in chosen] == [backend] * len(gpus)
