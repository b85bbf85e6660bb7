"""The copy to page-locked memory overlaps training on CUDA only: the CPU tests cannot see it race."""

from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.staging import device_to_host
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.checkpoint.train_state import get_live_state, get_local
from elastic.config import RunConfig
from elastic.ports import Progress
from elastic.storage import open_storage

WIDTH = 2048  # 16 layers, weight and moments: 0.75 GiB, some steps' worth of copying


def build(device, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(16)]).to(device)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def train(model, optimizer, device, checkpointer, num_steps):
    for _ in range(num_steps):
        model(torch.ones(64, WIDTH, device=device)).square().mean().backward()
        checkpointer.wait_staged()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.poll()


def copy_bits(model, optimizer):
    """Return the state as raw bytes: NaN equals NaN, and nothing else passes for equal."""
    live = get_live_state(model, optimizer)
    return {name: get_local(t).detach().to("cpu", copy=True).reshape(-1).view(torch.uint8) for name, t in live.items()}


def check_saves(device, storage):
    config = RunConfig()
    model, optimizer = build(device, seed=0)
    checkpointer = Checkpointer(storage, config, device=device, generation=1)
    train(model, optimizer, device, checkpointer, 1)
    for step in range(1, 5):  # the buffers of the first save serve the others
        saved = copy_bits(model, optimizer)
        assert checkpointer.start_save(model, optimizer, progress=Progress(step=step), extra={})
        train(model, optimizer, device, checkpointer, 5)
        checkpointer.finish()

        twin, twin_optimizer = build(device, seed=1)
        restored = restore(storage, twin, twin_optimizer, config=config, device=device)
        assert restored is not None
        assert restored.progress.step == step
        loaded = copy_bits(twin, twin_optimizer)
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
        moved = copy_bits(model, optimizer)
        assert not torch.equal(saved["model.0.weight"], moved["model.0.weight"]), "training went on meanwhile"
    checkpointer.close()


def check_snapshots(device, storage, memory, replica_servers):
    """Save to memory and load from there."""
    config = RunConfig()
    model, optimizer = build(device, seed=0)
    checkpointer = Checkpointer(storage, config, device=device, generation=1, memory=memory)
    train(model, optimizer, device, checkpointer, 1)
    for step in range(1, 4):
        saved = copy_bits(model, optimizer)
        assert checkpointer.start_save(model, optimizer, progress=Progress(step=step), extra={}, tier="memory")
        assert not checkpointer.start_save(model, optimizer, progress=Progress(step=step), extra={}, tier="storage")
        assert checkpointer.get_due(step) == "storage", "there is no room for two on the device, but none is forgotten"
        train(model, optimizer, device, checkpointer, 5)
        checkpointer.finish("memory")
        twin, twin_optimizer = build(device, seed=1)

        def restore_twin(step=step, twin=twin, twin_optimizer=twin_optimizer, saved=saved):
            model_and_optimizer = (twin, twin_optimizer)
            restored = restore(
                storage,
                *model_and_optimizer,
                config=config,
                device=device,
                memory=memory,
                replica_servers=replica_servers,
            )
            assert restored is not None
            assert (restored.progress.step, restored.source) == (step, "memory")
            loaded = copy_bits(*model_and_optimizer)
            assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []

        index = memory.find_index(generation=1, step=step)
        in_buffer = memory.get_buffers(device).get(index)[
            checkpointer._plan.get().own.entries["model.3.weight"].offset :
        ]
        in_buffer[7] ^= 1  # nobody reads what the device still has
        restore_twin()
        take_memory(memory.get_buffers(device).engine)
        with pytest.raises(AssertionError):
            restore_twin()
        in_buffer[7] ^= 1
        restore_twin()
    checkpointer.close()


def take_memory(exit_):
    """Put the memory of the last copies on the device to another use."""
    with torch.cuda.stream(exit_.stream):
        copies = [
            torch.empty(copy._num_bytes, dtype=torch.uint8, device=exit_.device) for copy in exit_._residents.values()
        ]
        for copy in copies:
            copy.fill_(1)


@pytest.fixture
def device():
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield device
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_restored_is_bit_for_bit_what_was_there_when_the_save_started(device, tmp_path):
    check_saves(device, open_storage(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_restored_from_memory_is_the_same(device, tmp_path):
    server = start_replica_server(node="a", ip="127.0.0.1", secret="s")
    memory = Memory(server.open_connection(), node="a", secret="s")
    check_snapshots(device, open_storage(tmp_path), memory, {"a": ("127.0.0.1", server.port)})
    server.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_room", [True, False])
def test_the_snapshot_before_stays_on_a_device_with_room(device, tmp_path, monkeypatch, has_room):
    """Give the next one up on its way; what the device has of the one before is taken, whatever the host has."""
    if not has_room:
        monkeypatch.setattr(device_to_host, "has_room_for_two", lambda *_, **__: False)
    config, storage = RunConfig(), open_storage(tmp_path)
    server = start_replica_server(node="a", ip="127.0.0.1", secret="s")
    memory = Memory(server.open_connection(), node="a", secret="s")
    model, optimizer = build(device, seed=0)
    checkpointer = Checkpointer(storage, config, device=device, generation=1, memory=memory)
    train(model, optimizer, device, checkpointer, 1)
    for step in (1, 2, 3):  # the third has its place on the device from the first
        saved = copy_bits(model, optimizer)
        assert checkpointer.start_save(model, optimizer, progress=Progress(step=step), extra={}, tier="memory")
        train(model, optimizer, device, checkpointer, 1)
        checkpointer.finish("memory")
    buffers = memory.get_buffers(device)
    with ThreadPoolExecutor(1) as pool:
        with buffers.engine.lock:  # it stays on the device
            assert checkpointer.start_save(model, optimizer, progress=Progress(step=4), extra={}, tier="memory")
            closed = pool.submit(checkpointer.close)
            wait([closed], timeout=0.5)
        closed.result()
    torch.cuda.synchronize()
    index = memory.find_index(generation=1, step=3)
    buffers.get(index)[checkpointer._plan.get().own.entries["model.3.weight"].offset + 7] ^= 1

    twin, twin_optimizer = build(device, seed=1)
    replica_servers = {"a": ("127.0.0.1", server.port)}
    restored = restore(
        storage, twin, twin_optimizer, config=config, device=device, memory=memory, replica_servers=replica_servers
    )
    if has_room:
        assert (restored.progress.step, restored.source) == (3, "memory")
        loaded = copy_bits(twin, twin_optimizer)
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    else:
        assert restored is not None, "there is an older one"
        assert restored.progress.step == 2, "what the host has of the third is damaged"
    server.close()
