"""Measures the bus bandwidth of an all-reduce over every process of a torchrun, and fails below what is expected.

Enters: --expect GB/s, --megabytes. Leaves: one JSON line on rank 0; exit code 1 below the expectation.
Refuses: fewer than two processes: one alone moves nothing.

Bus bandwidth as NCCL's tests define it: bytes / seconds x 2 (n - 1) / n, which the slowest link bounds whatever n is.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist


def bus_gigabytes_per_second(n_bytes: int, seconds: float, processes: int) -> float:
    return n_bytes / seconds * 2 * (processes - 1) / processes / 1e9


def measure(n_bytes: int, *, rounds: int, device: torch.device) -> float:
    """Median seconds of one all-reduce of `n_bytes`, the slowest process counting."""
    tensor = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    seconds = []
    for turn in range(rounds + 5):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        tensor.fill_(1.0)
        if turn >= 5:  # the first build the rings
            seconds.append(took.item())
    return sorted(seconds)[len(seconds) // 2]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--expect", type=float, required=True, help="GB/s")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    processes = dist.get_world_size()
    if processes < 2:
        sys.exit("An all-reduce of one process moves nothing: start at least two.")
    n_bytes = options.megabytes * 2**20
    seconds = measure(n_bytes, rounds=options.rounds, device=device)
    reached = bus_gigabytes_per_second(n_bytes, seconds, processes)
    if dist.get_rank() == 0:
        result = {"processes": processes, "bytes": n_bytes, "seconds": seconds, "bus_gb_s": reached}
        print(json.dumps(result | {"expected_gb_s": options.expect, "passed": reached >= options.expect}), flush=True)
    dist.destroy_process_group()
    return 0 if reached >= options.expect else 1


if __name__ == "__main__":
    sys.exit(main())
