"""Block inputs that wait for the backward in host memory."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cluster.planner.host_memory import estimate_host_gib
from cluster.planner.memory import estimate_memory
from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.nn import recompute
from elastic.nn.recompute import set_compile, set_offload, set_recompute


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BSD, table_SD):
        return x_BSD + torch.tanh(self.layer(x_BSD)) * table_SD


def run(block, inputs, table):
    inputs = inputs.clone().requires_grad_()
    result = block(inputs * 1.0, table)  # as behind another block
    block.zero_grad()
    result.square().sum().backward()
    return inputs.grad, block.layer.weight.grad.clone()


# torch.compile's own
_IGNORED = (
    "`torch.jit.script_method`:DeprecationWarning",
    "The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
COMPILED = pytest.param(
    True, marks=[pytest.mark.long, *(pytest.mark.filterwarnings(f"ignore:{words}") for words in _IGNORED)]
)


@pytest.mark.parametrize("compiles", [False, COMPILED])
def test_the_input_of_a_block_leaves_the_device_and_nothing_else(compiles, monkeypatch):
    torch.manual_seed(0)
    inputs, table, block = torch.randn(2, 5, 8), torch.randn(5, 8), Block()
    expected = run(block, inputs, table)
    set_recompute(block, "offload")
    if compiles:
        set_compile(block)
    set_offload(block)
    kept, put = [], recompute._put_into_host
    monkeypatch.setattr(recompute, "_put_into_host", lambda x, saved: kept.append(put(x, saved)) or kept[-1])
    for result, wanted in zip(run(block, inputs, table), expected, strict=True):
        torch.testing.assert_close(result, wanted)
    left = [tensor for tensor, device in kept if device is not None]
    assert [tensor.shape for tensor in left] == [inputs.shape]
    assert torch.equal(left[0], inputs)


def test_a_plan_moves_the_inputs_of_all_blocks_but_one_to_the_host():
    config = RunConfig(
        model=ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, vocab_size=32000),
        **{"precision": "bf16", "compile": True, "recompute": "full", "data": DataConfig(seq_len=32768)},
        train=TrainConfig(global_batch=4, micro_batch=1),
    )
    inputs_gib = 16 * 32768 * 2048 * 2 / 2**30
    offload = replace(config, recompute="offload")
    host_gib = [estimate_host_gib(each, world_size=1, gpus_per_node=1) for each in (config, offload)]
    assert host_gib[1] - host_gib[0] == pytest.approx(inputs_gib)
    gpu_gib = [estimate_memory(each, world_size=1).peak_gib for each in (config, offload)]
    assert 0.8 * inputs_gib < gpu_gib[0] - gpu_gib[1] <= inputs_gib * 1.01
