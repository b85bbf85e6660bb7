"""Forward and backward of a microbatch as two CUDA graphs: a small model's kernels are shorter than their launches."""

from typing import Any

import torch
from torch import Tensor, nn

# torch.autograd.grad is not in torch.autograd's __all__:
# pyright: reportPrivateImportUsage=false

MAX_FLOPS = 3e13
"""Of a forward and backward, some 50 ms of an H100: above, launches are hidden behind the work, and only the memory
that graphs hold on to would be felt."""

_NUM_WARMUPS = 3


class GraphedLoss:
    """Calls a model whose inputs keep their shape and whose parameters keep their place."""

    def __init__(self, model: nn.Module, tokens_BS: Tensor, labels_BS: Tensor) -> None:
        """Run the model a few times on these inputs, then record it; no gradient is left behind."""
        self.params = tuple(model.parameters())
        self._inputs = (tokens_BS.clone(), labels_BS.clone())
        self._factor = torch.ones((), dtype=torch.float32, device=tokens_BS.device)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARMUPS):
                torch.autograd.grad(model(*self._inputs), self.params, self._factor)
        current.wait_stream(side)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the loader's and the checkpointer's threads go on meanwhile
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            nats = model(*self._inputs)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"):
            self._grads = torch.autograd.grad(nats, self.params, self._factor)
        self._nats = nats.detach()

    def fits(self, tokens_BS: Tensor) -> bool:
        """Tell whether these inputs have the shape that was recorded."""
        return tokens_BS.shape == self._inputs[0].shape

    def __call__(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the summed nats; gradients that its backward brings are overwritten by the next one's."""
        return _Replay.apply(self, tokens_BS, labels_BS, *self.params)  # pyright: ignore[reportReturnType] # apply is untyped

    def replay_forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Run the recorded forward."""
        self._inputs[0].copy_(tokens_BS)
        self._inputs[1].copy_(labels_BS)
        self._forward.replay()
        return self._nats.clone()

    def replay_backward(self, factor: Tensor) -> tuple[Tensor, ...]:
        """Run the recorded backward of the last forward."""
        self._factor.copy_(factor)
        self._backward.replay()
        return tuple(grad.detach() for grad in self._grads)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: GraphedLoss, tokens_BS: Tensor, labels_BS: Tensor, *_params: Tensor) -> Tensor:
        ctx.graphs = graphs
        return graphs.replay_forward(tokens_BS, labels_BS)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, *ctx.graphs.replay_backward(grads[0])
