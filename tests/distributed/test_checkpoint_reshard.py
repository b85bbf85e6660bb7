"""A state that goes from world to world and from strategy to strategy stays the same, in little host memory."""

import ctypes
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.restore.fill_tensors import NUM_READERS, READ_BYTES
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.train_state import get_live_state
from elastic.direct import READ_PIECE_BYTES
from elastic.storage import open_storage
from tests.distributed._spawn_ckpt import CONFIG, CPU, build, make_progress, run_ranks

pytestmark = pytest.mark.timeout(600)

MIB = 2**20
STATE_BYTES = 3 * 4 * 2048 * 2048 * 4  # weights and two moments of four layers: 192 MiB
# buffers of all readers, and what allocator and threads keep beside them
BOUND_BYTES = NUM_READERS * (READ_BYTES + READ_PIECE_BYTES) + 24 * MIB
CHAINS = {
    "4 -> 3 -> 1 -> 2": [("fsdp2", 4), ("fsdp2", 3), ("single", 1), ("fsdp2", 2)],
    "fsdp2 -> ddp -> hsdp": [("fsdp2", 2), ("ddp", 2), ("hsdp", 4)],
}


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)])

    def forward(self, x):
        return self.layers(x)


def read_status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def get_digests(live):
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in live.items())
    return {name: zlib.crc32(tensor.contiguous().numpy()) for name, tensor in whole}


def pass_on(run_dir, strategy, step):
    """Take over what the last world saved (none: make noise) and save it anew; return digests and the load's peak."""
    model, optimizer = build(strategy, model_seed=step, make_model=Large)
    live = get_live_state(model, optimizer)  # moments included
    storage, peak_bytes = open_storage(run_dir), 0
    for index, tensor in enumerate(live.values()):
        is_shared = not isinstance(tensor, DTensor)
        torch.manual_seed(1000 * index + (0 if is_shared else torch.distributed.get_rank()))
        (tensor if is_shared else tensor.to_local()).detach().uniform_()  # all pages are there before the load
    if step > 1:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken
        before_bytes = read_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        restored = restore(storage, model, optimizer, config=CONFIG, device=CPU)
        assert restored.progress.step == step - 1
        peak_bytes = read_status("VmHWM") - before_bytes
    digests = get_digests(live)
    checkpointer = Checkpointer(storage, CONFIG, device=CPU, generation=step)
    checkpointer.save_now(model, optimizer, progress=make_progress(step), extra={})
    checkpointer.close()
    return digests, peak_bytes


@pytest.mark.parametrize("chain", CHAINS)
def test_a_state_is_the_same_in_every_world_and_no_rank_holds_much_of_it_on_the_host(chain, tmp_path, capsys):
    digests, told = None, []
    for step, (strategy, num_ranks) in enumerate(CHAINS[chain], start=1):
        results = run_ranks(pass_on, num_ranks, tmp_path, strategy, step)
        digests = digests or results[0][0]
        for rank_digests, peak_bytes in results:
            assert rank_digests == digests, f"{strategy} on {num_ranks} ranks has another state"
            assert peak_bytes < BOUND_BYTES < 0.6 * STATE_BYTES
        told.append(f"{strategy} on {num_ranks}: {max(peak for _, peak in results) / MIB:.0f} MiB")
    with capsys.disabled():
        print(f"\n{chain}, {STATE_BYTES / MIB:.0f} MiB of state; host memory at load, per rank: {', '.join(told[1:])}")
