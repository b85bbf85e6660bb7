"""Break a world at one collective of a step, on one rank or on all, and tell what is left of the step."""

import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.breaker import Breaker
from elastic.training.step import build_trainable, train_step
from elastic.world import close_world, get_device, open_world
from tests.distributed._ranks import spec
from tests.distributed._tiny import CONFIG, global_batch, rank_microbatches

TIMEOUT_S = 30.0
LATER_S = 0.3
"""The other ranks hear of it so much later."""


class AtCollective(TorchDispatchMode):
    """Calls a function right before the nth collective that this thread asks for, and counts them."""

    def __init__(self, index: int | None = None, act: Any = None) -> None:
        super().__init__()
        self.num_seen, self._index, self._act = 0, index, act

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            if self.num_seen == self._index:
                self._act()
            self.num_seen += 1
        return func(*args, **(kwargs or {}))


def _microbatches(step: int, world) -> list[Any]:
    pairs = rank_microbatches(global_batch(step), world)
    return [(tokens.to(world.device), labels.to(world.device)) for tokens, labels in pairs]


def _own_state(trainable) -> dict[str, torch.Tensor]:
    """This rank's rows of weights and moments."""

    def local(tensor):
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().cpu().clone()

    # those of the optimizer: a model that FSDP2 was interrupted in may show what it has gathered
    params = [param for group in trainable.optimizer.param_groups for param in group["params"]]
    state = {f"{index}": local(param) for index, param in enumerate(params)}
    for index, param in enumerate(params):
        state |= {f"{index}.{key}": local(value) for key, value in trainable.optimizer.state[param].items()}
    return state


def _is_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def break_at_each_collective(rank: int, port: int, strategy: str, num_ranks: int, device: str):
    """Make two steps, the second one in a world that rank 0 leaves at its nth collective; for each n.

    Returns:
        For each n "void" (an error, and nothing has changed), "done" (as in an unbroken world), or what is wrong.
    """
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    config = replace(CONFIG, strategy=strategy, shard_size=2 if strategy == "hsdp" else 0)
    found: list[str] = []
    wanted: tuple[Any, Any] | None = None
    num_collectives, attempt = 1, 0
    while attempt <= num_collectives:  # the first world is left alone, and shows what is right
        breaker = Breaker()
        place = replace(spec(rank, port, world_size=num_ranks, attempt=attempt), store_host="127.0.0.1")
        presence = breaker.arm(get_device(device, local_rank=rank))
        world = open_world(place, device=device, timeout_s=TIMEOUT_S, presence=presence)
        trainable = build_trainable(config, world)
        train_step(trainable, _microbatches(0, world), lr=3e-3, max_grad_norm=1.0, world=world)
        before = _own_state(trainable)
        timer = threading.Timer(LATER_S, breaker.break_world)
        if attempt and rank:
            timer.start()
        mode = AtCollective(attempt - 1 if attempt and rank == 0 else None, lambda b=breaker: _break_beside(b))
        try:
            with mode:
                result = train_step(trainable, _microbatches(1, world), lr=3e-3, max_grad_norm=1.0, world=world)
            told = (result.loss, result.grad_norm)
        except Exception:  # of many kinds: as a trainer, we ask the breaker
            if not breaker.is_broken and not attempt:
                raise
            told = None
        timer.join() if attempt and rank else None
        after = _own_state(trainable)
        if wanted is None:
            assert told is not None
            wanted, num_collectives = (told, after), mode.num_seen
            store.set(f"num-{rank}", str(num_collectives))
            num_collectives = int(store.get("num-0"))  # the others may count otherwise
        elif told is None:
            found.append("void" if _is_equal(before, after) else "an error, and a changed state")
        else:
            is_right = _is_equal(after, wanted[1]) and torch.allclose(torch.tensor(told), torch.tensor(wanted[0]))
            found.append("done" if is_right else f"told {told} instead of {wanted[0]}")
        breaker.disarm()
        del trainable
        close_world(world, peers="lost")
        store.add(f"left-{attempt}", 1)
        while int(store.add(f"left-{attempt}", 0)) < num_ranks:
            pass
        attempt += 1
    return found


def _break_beside(breaker: Breaker) -> None:
    """From another thread, as the one that hears the coordinator does."""
    thread = threading.Thread(target=breaker.break_world)
    thread.start()
    thread.join()
