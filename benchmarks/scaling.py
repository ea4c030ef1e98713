"""What a second process costs: `torchrun --nproc-per-node 2 -m benchmarks.scaling MODEL STEPS`.

Enters: a model folder, steps a measurement. Leaves: one JSON line: processor seconds a step, alone and in two, and
what the difference goes into.
Refuses: to state a speed: two processes of one busy machine share its cores; what they spend is what can be told.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fmops.adapters import ranks
from fmops.adapters.document_attention import attend_by_document
from fmops.adapters.linear_loss import learn_without_logits
from fmops.adapters.model_files import load_model, quiet
from fmops.adapters.packing import Block, collate
from fmops.adapters.sharding import shard

PAIRS = 5
BLOCK, BLOCKS = 512, 4
"""Tokens of a block, blocks of a step."""


def stepper(folder: Path, *, way: str) -> Callable[[int], tuple[float, float]]:
    """Optimizer steps over this rank's share of the blocks: all in one process (`alone`), half in two.

    Called with a number of steps it returns processor seconds for gradients, which are averaged meanwhile, and for
    clipping and the optimizer.
    """
    model = load_model(folder)
    attend_by_document(model, note=print)
    learn_without_logits(model, note=print)
    mine = range(BLOCKS) if way == "alone" else range(ranks.rank(), BLOCKS, ranks.world())
    trained = shard(model, "fsdp2") if way == "fsdp2" else model
    if way == "ddp":
        trained = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rng = np.random.default_rng(0)
    blocks = [
        Block(rng.integers(3, model.config.vocab_size - 1, BLOCK).astype(np.int32), (BLOCK // 4,) * 4)
        for _ in range(BLOCKS)
    ]

    def step(count: int) -> tuple[float, float]:
        gradients = update = 0.0
        for _ in range(count):
            start = time.process_time()
            trained(**collate([blocks[index] for index in mine])).loss.backward()
            middle = time.process_time()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            gradients, update = gradients + middle - start, update + time.process_time() - middle
        return gradients, update

    return step


def main(folder: Path, steps: int) -> None:
    """A B C A B C: one process while the other waits, two with DDP, two with FSDP2; medians and ranges of `PAIRS`."""
    quiet()
    torch.set_num_threads(1)
    with ranks.joined():
        ways = {way: stepper(folder, way=way) for way in ("alone", "ddp", "fsdp2")}
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for turn in range(PAIRS + 1):
            for way, step in ways.items():
                dist.barrier()
                used = step(steps) if way != "alone" or ranks.rank() == 0 else (0.0, 0.0)
                gradients, update = ranks.summed(used)
                if turn:
                    spent[way].append((gradients / steps, update / steps))
        parameters = sum(p.numel() for p in load_model(folder).parameters())
        if ranks.rank() == 0:
            middle = {
                way: [statistics.median(part) for part in zip(*found, strict=True)] for way, found in spent.items()
            }
            totals = {way: [sum(pair) for pair in found] for way, found in spent.items()}
            alone = statistics.median(totals["alone"])
            print(json.dumps({
                "parameters": parameters,
                "tokens_a_step": BLOCK * BLOCKS,
                "n": PAIRS,
                "cpu_s_a_step": {
                    way: [round(value, 4) for value in (statistics.median(found), min(found), max(found))]
                    for way, found in totals.items()
                },
                "efficiency": {way: round(alone / statistics.median(totals[way]), 3) for way in ("ddp", "fsdp2")},
                "lost_of_a_step": {
                    way: {
                        "averaging, gathering, shorter rows": round((middle[way][0] - middle["alone"][0]) / alone, 3),
                        "update": round((middle[way][1] - middle["alone"][1]) / alone, 3),
                    }
                    for way in ("ddp", "fsdp2")
                },
                "megabytes_sent_a_rank_and_step": {
                    "ddp": round(4 * parameters / 1e6, 2), "fsdp2": round(1.5 * 4 * parameters / 1e6, 2)
                },
            }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
