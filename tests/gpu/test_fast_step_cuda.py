"""Kernels, graphs and back ends of attention against plain torch: none of them runs on a CPU."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.nn import fused, loss
from elastic.nn.attention import attend
from elastic.nn.layers import build_rope_tables
from elastic.nn.loss import IGNORE, sum_cross_entropy
from elastic.optim.copies import CopyingAdamW
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, train_step
from elastic.world import close_world, open_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore"),  # of the compilers
]

CONFIG = RunConfig(
    precision="bf16",
    strategy="single",
    compile=True,
    model=ModelConfig(dim=256, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=512, vocab_size=1000),
    data=DataConfig(seq_len=128),
    train=TrainConfig(global_batch=4, micro_batch=4),
)


@pytest.fixture(scope="module")
def world():
    place = WorldSpec(
        rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="127.0.0.1", store_port=0
    )
    world = open_world(place, device="cuda", timeout_s=60, store=dist.HashStore())
    yield world
    close_world(world)


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


@pytest.mark.parametrize("vocab_size", [1000, 50304, 128256])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_loss_and_gradients(vocab_size, num_chunks, monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS_BYTES", math.ceil(300 / num_chunks) * vocab_size * 2)
    hidden, weight = draw(3, 100, 64), draw(vocab_size, 64)
    labels = torch.randint(vocab_size, (3, 100), device="cuda")
    labels[0, ::7] = IGNORE
    logits = (hidden @ weight.T).float()  # rounded to bf16, as the kernel reads them
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    wanted_grads = torch.autograd.grad(wanted / 99, (hidden, weight))
    nats = sum_cross_entropy(hidden, weight, labels)
    assert nats.item() == pytest.approx(wanted.item(), rel=1e-5)
    for found, grad in zip(torch.autograd.grad(nats / 99, (hidden, weight)), wanted_grads, strict=True):
        assert error(found, grad) < 1e-2


@pytest.mark.parametrize("inner", [48, 1024, 3000])
def test_swiglu(inner):
    joined, weight, grad = draw(2, 5, 2 * inner), draw(64, inner), draw(2, 5, 64).detach()
    gate, up = joined.double().chunk(2, dim=-1)
    wanted = F.linear(F.silu(gate) * up, weight.double())
    found = fused.swiglu_down(joined, weight)
    assert error(found, wanted) < 1e-2
    wanted_grads = torch.autograd.grad(wanted, (joined, weight), grad.double())
    for grad_found, grad_wanted in zip(torch.autograd.grad(found, (joined, weight), grad), wanted_grads, strict=True):
        assert error(grad_found, grad_wanted) < 1e-2


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(4, 2, 64), (12, 12, 64), (24, 8, 128), (3, 1, 48)])
def test_rotation(num_heads, num_kv_heads, size):
    config = ModelConfig(dim=num_heads * size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=size)
    tables = build_rope_tables(config.rope, torch.arange(50, device="cuda"))
    joined = draw(2, 50, (num_heads + 2 * num_kv_heads) * size)
    on_cpu = joined.detach().cpu().requires_grad_()
    wanted = fused.split_and_rotate(on_cpu, *(table.cpu() for table in tables), num_heads, num_kv_heads)
    found = fused.split_and_rotate(joined, *tables, num_heads, num_kv_heads)
    grads = [torch.randn_like(part) for part in wanted]
    for part, wanted_part in zip(found, wanted, strict=True):
        assert error(part.cpu(), wanted_part) < 1e-3
    (wanted_grad,) = torch.autograd.grad(wanted, on_cpu, grads)
    (found_grad,) = torch.autograd.grad(found, joined, [grad.cuda() for grad in grads])
    assert error(found_grad.cpu(), wanted_grad) < 1e-3


def test_update_is_that_of_torch_and_copies_follow():
    shapes = [(1000, 64), (64, 64), (48,), (5000, 7)]
    weights = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    copies = {weight: weight.detach().bfloat16() for weight in weights}
    plain = [nn.Parameter(weight.detach().clone()) for weight in weights]
    groups = [{"params": list(part), "weight_decay": decay} for part, decay in ((weights[:2], 0.1), (weights[2:], 0.0))]
    plain_groups = [{**group, "params": plain[i * 2 : i * 2 + 2]} for i, group in enumerate(groups)]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    ours, torchs = (
        CopyingAdamW(groups, copies=copies, **options),
        torch.optim.AdamW(plain_groups, fused=True, **options),
    )
    for _ in range(5):
        for weight, reference in zip(weights, plain, strict=True):
            weight.grad_dtype = None
            weight.grad = torch.randn_like(weight, dtype=torch.bfloat16)
            reference.grad = weight.grad.float()
        norm = ours.clip(3.0)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(plain, 3.0).item(), rel=1e-5)
        ours.step()
        torchs.step()
    for weight, reference in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-6)
        assert torch.equal(copies[weight], weight.detach().bfloat16())
        assert ours.state[weight]["step"] == 5


def losses(config, world, *, steps=6, num_microbatches=1):
    trainable = build_trainable(config, world)
    found = []
    for step in range(steps):
        ids = torch.randint(1000, (4 * num_microbatches, 129), generator=torch.Generator().manual_seed(step)).cuda()
        batches = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids.chunk(num_microbatches)]
        found.append(train_step(trainable, batches, lr=1e-3, max_grad_norm=1.0, world=world).loss)
    return found


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_graphs_replay_what_they_recorded(world, num_microbatches):
    config = replace(CONFIG, attention="flash")
    recorded = losses(config, world, num_microbatches=num_microbatches)
    launched = losses(replace(config, cuda_graph="off"), world, num_microbatches=num_microbatches)
    assert recorded == pytest.approx(launched, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "selective"},
        {"recompute": "full"},
        {"recompute": "budget", "recompute_budget": 0.3},
        {"strategy": "fsdp2"},
        {"strategy": "ddp"},
        {"compile": False},
    ],
    ids=str,
)
def test_all_ways_train_alike(world, options):
    torch._dynamo.reset()
    assert losses(replace(CONFIG, **options), world) == pytest.approx(losses(CONFIG, world), rel=5e-3)


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
def test_fp8_trains_like_bf16(world, precision):
    pytest.importorskip("torchao")
    torch._dynamo.reset()
    assert losses(replace(CONFIG, precision=precision), world) == pytest.approx(losses(CONFIG, world), rel=1e-2)


@pytest.mark.parametrize("kind", ["cudnn", "flash", "fa4"])
def test_back_ends_of_attention(kind):
    if kind == "fa4":
        pytest.importorskip("flash_attn.cute")
    query, key, value = (draw(2, heads, 256, 64) for heads in (8, 2, 2))
    grad = torch.randn_like(query)
    wanted = attend(*(tensor.double() for tensor in (query, key, value)), kind="auto")
    found = attend(query, key, value, kind=kind)
    assert error(found, wanted) < 1e-2
    inputs = (query, key, value)
    for found_grad, wanted_grad in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad.double()), strict=True
    ):
        assert error(found_grad, wanted_grad) < 2e-2
