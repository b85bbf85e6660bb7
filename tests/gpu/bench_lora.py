"""Measure LoRA and QLoRA on one GPU, beside a plain loop of PEFT and transformers where these are installed.

    PYTHONPATH=. python tests/gpu/bench_lora.py [--only WORD ...] [--steps 10] [--limit-s 540]

Each case is a process of its own and prints `RESULT {json}`: tokens/s (median step), peak GiB, loss of the first step.
Random weights, rank 16 beside all linear layers of the blocks, sequences of 4096 tokens, bf16. In 4 bits, theirs are
bitsandbytes' (NF4, double quantisation), quantised a layer at a time. TRY_ON_CPU=1 runs tiny shapes, to see that it
works at all; bitsandbytes is needed for that, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, train_step
from elastic.tuning import LoraConfig
from elastic.world import close_world, open_store, open_world

TRY_ON_CPU = bool(os.environ.get("TRY_ON_CPU"))
SEQ_LEN = 32 if TRY_ON_CPU else 4096
LLAMA3 = {"vocab_size": 128256, "rope_theta": 500_000.0, "tied_head": False, "num_kv_heads": 8}
SHAPES = {
    "1.5B": ModelConfig(dim=2048, num_layers=16, num_heads=32, ffn_dim=8192, **LLAMA3),
    "8B": ModelConfig(dim=4096, num_layers=32, num_heads=32, ffn_dim=14336, **LLAMA3),
}
if TRY_ON_CPU:
    TINY = ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128, vocab_size=128, tied_head=False)
    SHAPES = dict.fromkeys(SHAPES, TINY)
CASES = {  # shape, sequences of a step, recompute, who: whose code, how it is run, how frozen weights are held
    "1.5B ours": ("1.5B", 4, "none", "ours"),
    "1.5B peft": ("1.5B", 4, "none", "peft"),
    "1.5B peft compiled": ("1.5B", 4, "none", "peft compiled"),
    "8B ours": ("8B", 1, "none", "ours"),
    "8B ours recompute": ("8B", 4, "full", "ours"),
    "8B peft": ("8B", 1, "none", "peft"),
    "8B peft recompute": ("8B", 4, "full", "peft"),
    "1.5B ours qlora": ("1.5B", 4, "none", "ours qlora"),
    "1.5B peft qlora": ("1.5B", 4, "none", "peft qlora"),
    "8B ours qlora": ("8B", 1, "none", "ours qlora"),
    "8B ours qlora recompute": ("8B", 1, "full", "ours qlora"),
    "8B peft qlora": ("8B", 1, "none", "peft qlora"),
    "8B peft qlora recompute": ("8B", 1, "full", "peft qlora"),
}
_PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
LORA = LoraConfig(rank=16, alpha=32.0)


def get_device():
    return torch.device("cpu" if TRY_ON_CPU else "cuda:0")


def draw_batch(model, batch):
    ids = torch.randint(model.vocab_size, (batch, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return ids.to(get_device())


def time_steps(step, num_steps):
    losses, seconds = [], []
    for _ in range(num_steps + 3):  # the first ones compile
        start_s = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start_s)  # a step ends with its loss on the host
    return losses[0], statistics.median(seconds[3:])


def run_ours(model, batch, recompute, num_steps, *, tune):
    config = RunConfig(
        model=model,
        data=DataConfig(seq_len=SEQ_LEN),
        train=TrainConfig(global_batch=batch, micro_batch=batch),
        **{"precision": "bf16", "compile": not TRY_ON_CPU, "recompute": recompute, "tune": tune, "lora": LORA},
    )
    store = open_store("127.0.0.1", timeout_s=30)
    place = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "attempt": 1}
    spec = WorldSpec(**place, store_host=store.host, store_port=store.port)
    world = open_world(spec, device=get_device().type, timeout_s=30, store=store)
    trainable, ids = build_trainable(config, world), draw_batch(model, batch)
    microbatch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step():
        return train_step(trainable, [microbatch], lr=1e-4, max_grad_norm=1.0, world=world).loss

    try:
        return time_steps(step, num_steps)
    finally:
        close_world(world)


def hold_in_4_bits(block):
    """Put bitsandbytes' layers in the place of a block's linear ones, as transformers does when it loads weights."""
    import bitsandbytes as bnb

    layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)]
    for name, layer in layers:
        kinds = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="cpu", **kinds)
        packed.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        block.set_submodule(name, packed.to(get_device()))  # the move quantises


def build_theirs(config, *, in_4_bits):
    """Return transformers' model; in 4 bits a block at a time, so that the peak is not that of 16 bits."""
    from transformers import LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    if not in_4_bits:
        with get_device():
            theirs = LlamaForCausalLM(config)
    else:
        with torch.device("meta"):
            theirs = LlamaForCausalLM(config)
        rotary = type(theirs.model.rotary_emb)
        for block in theirs.model.layers:
            block.to_empty(device=get_device())
            for param in block.parameters():
                torch.nn.init.normal_(param, std=0.02) if param.ndim > 1 else torch.nn.init.ones_(param)
            hold_in_4_bits(block)
        for part in (theirs.model.embed_tokens, theirs.model.norm, theirs.lm_head):
            part.to_empty(device=get_device())
            for param in part.parameters():
                torch.nn.init.normal_(param, std=0.02) if param.ndim > 1 else torch.nn.init.ones_(param)
        with get_device():
            theirs.model.rotary_emb = rotary(config=config)
        theirs.is_loaded_in_4bit = True  # PEFT has adapters of its own for these
    torch.set_default_dtype(torch.float32)
    return theirs.requires_grad_(False)


def run_peft(model, batch, recompute, num_steps, *, compiles, in_4_bits):
    import peft
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{"hidden_size": model.dim, "intermediate_size": model.ffn_dim, "vocab_size": model.vocab_size},
        **{"num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads},
        **{"num_key_value_heads": model.num_kv_heads, "max_position_embeddings": SEQ_LEN, "use_cache": False},
        attn_implementation="sdpa",
    )
    theirs = build_theirs(config, in_4_bits=in_4_bits)
    if recompute == "full":
        theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        theirs.enable_input_require_grads()
    lora = peft.LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=_PROJECTIONS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(theirs, lora).train()
    params = [param for param in wrapped.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    run = torch.compile(wrapped) if compiles else wrapped
    ids = draw_batch(model, batch)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(get_device().type, torch.bfloat16):  # adapters are fp32
            logits_BSV = run(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    return time_steps(step, num_steps)


def run_case(name, num_steps):
    shape, batch, recompute, who = CASES[name]
    model = SHAPES[shape]
    in_4_bits = who.endswith("qlora")
    if who.startswith("ours"):
        loss, step_s = run_ours(model, batch, recompute, num_steps, tune="qlora" if in_4_bits else "lora")
    else:
        how = {"compiles": who.endswith("compiled"), "in_4_bits": in_4_bits}
        loss, step_s = run_peft(model, batch, recompute, num_steps, **how)
    peak = 0.0 if TRY_ON_CPU else torch.cuda.max_memory_allocated() / 2**30
    row = {
        "case": name,
        "batch": batch,
        "recompute": recompute,
        "step_ms": round(step_s * 1e3, 2),
        "loss": round(loss, 4),
    }
    print("RESULT", json.dumps({**row, "tokens_per_s": round(batch * SEQ_LEN / step_s), "peak_gib": round(peak, 2)}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit-s", type=float, default=540.0)
    args = parser.parse_args()
    if args.case:
        run_case(args.case, args.steps)
        return
    end_s = time.monotonic() + args.limit_s
    for name in CASES:
        if args.only and not any(word in name for word in args.only):
            continue
        command = [sys.executable, __file__, "--case", name, "--steps", str(args.steps)]
        try:
            subprocess.run(command, check=True, timeout=max(1.0, end_s - time.monotonic()))
        except (subprocess.SubprocessError, OSError) as error:
            print("FAILED", name, error, flush=True)


if __name__ == "__main__":
    main()
