"""Packed learning over weights that FSDP2 spreads over processes; run by test_processes.py."""

import sys

import torch
import torch.distributed as dist
from conftest import base_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head

from r3lib.shared_prefix import packed_values


def main(folder: str, sharded: str) -> None:
    """Each process has two rows of one prompt; where one process is all, it has all four."""
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model = base_model().train()
    add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy"))
    if sharded == "sharded":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    ids = torch.randint(20, 200, (2, 20), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    ids[1, 12:], ids[3, 12:] = ids[1, 12:] + 1, ids[3, 12:] + 1  # two completions of each prompt
    ids = ids.chunk(count)[rank]
    rows = list(range(len(ids)))
    logps, _ = packed_values(model, model.base_model, ids, torch.ones_like(ids), 8, rows, 1, evenly=count > 1)
    (logps * torch.arange(8).cos()).sum().div(4 / count).backward()  # FSDP averages
    found = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    torch.save({"logps": logps.detach(), "gradients": found}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
