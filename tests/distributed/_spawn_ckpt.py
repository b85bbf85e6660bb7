"""Run a function on several gloo ranks, some of which may die, and what the checkpoint tests train there."""

import traceback
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.train_state import get_live_state
from elastic.config import CheckpointConfig, FaultConfig, RunConfig
from elastic.ports import Progress
from elastic.storage import open_storage
from tests.forked import get_context

CPU = torch.device("cpu")
CONFIG = RunConfig(checkpoint=CheckpointConfig(keep_last=2), fault=FaultConfig(collective_timeout_s=30))


def run_ranks(work, num_ranks, run_dir, *args, timeout_s=60):
    """Return what `work(run_dir, *args)` returned on each rank: None for a rank that was killed."""
    context = get_context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe()
        place = (rank, num_ranks, store.port)
        process = context.Process(target=_work, args=(theirs, place, work, run_dir, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results = []
    try:
        for process, pipe in ranks:
            assert pipe.poll(timeout_s), "a rank hangs"
            try:
                error, result = pipe.recv()
            except EOFError:
                error, result = None, None
            assert error is None, error
            results.append(result)
            process.join(20)
    finally:
        for process, _ in ranks:
            process.kill()
    return results


def _work(pipe, place, work, run_dir, args):
    rank, world_size, port = place
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        pipe.send((None, work(run_dir, *args)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))


class Tied(nn.Module):
    """4 rows cut over 3 ranks leave one shard empty; 7 leave it short; the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 7)
        self.hidden = nn.Linear(7, 7)
        self.head = nn.Linear(7, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_B):
        return self.head(torch.relu(self.hidden(self.embed(tokens_B))))


class Wide(nn.Module):
    """Much state, and little to compute."""

    def __init__(self, width, num_layers):
        super().__init__()
        self.embed = nn.Embedding(4, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.head = nn.Linear(width, 4)

    def forward(self, tokens_B):
        hidden = self.embed(tokens_B)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh() / len(self.layers)
        return self.head(hidden)


def build(strategy, model_seed=0, make_model=Tied):
    torch.manual_seed(model_seed)
    model = make_model()
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    elif strategy == "hsdp":
        shape = (2, dist.get_world_size() // 2)
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
    elif strategy == "fsdp2":
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def train(model, optimizer, first_step, last_step, checkpointer=None):
    """All ranks take the same batch, so that every world computes the same update."""
    for step in range(first_step, last_step + 1):
        tokens_B = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens_B), (tokens_B + 1) % 4).backward()
        if checkpointer is not None:
            checkpointer.wait_staged()
        optimizer.step()
        optimizer.zero_grad()
        if checkpointer is not None:
            checkpointer.poll()


def get_values(model, optimizer):
    """Return the whole state as plain lists, the same in every world."""
    live = get_live_state(model, optimizer)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
        for name, tensor in live.items()
    }


def make_progress(step):
    return Progress(step=step, tokens=8 * step)


def make_checkpointer(run_dir, config=CONFIG, **kwargs):
    return Checkpointer(open_storage(run_dir), config, device=CPU, **{"generation": 1, **kwargs})


def do_restore(run_dir, model, optimizer, config=CONFIG):
    return restore(open_storage(run_dir), model, optimizer, config=config, device=CPU)
