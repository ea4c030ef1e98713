"""torchtitan's side of continued pretraining: one rank, inside torchtitan's own environment.

Enters: a job as `titan_pretrain` writes it, our shards, a Hugging Face folder. Leaves: reports, resume states, weights.
Refuses: a loss that is not finite; what torchtitan cannot train, `titan_pretrain` has refused before.

Of FMOps only modules that need no more than torch, numpy and pyarrow may be imported here. On a machine without an
accelerator torchtitan is told that processors are its device, and attention runs document by document: its own kernels
need a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils


class Processors:
    """What torchtitan asks of `torch.cuda`, answered for this machine's processors."""

    @staticmethod
    def nothing(*_: Any) -> None: ...

    set_device = synchronize = empty_cache = reset_peak_memory_stats = nothing
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_device_name = staticmethod(lambda _: "processors")

    @staticmethod
    def memory_stats(_: Any) -> dict[str, int]:
        return {}

    @staticmethod
    def get_device_properties(_: Any) -> Any:
        return type("Properties", (), {"total_memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")})


ON_GPU = torch.accelerator.is_available()
if not ON_GPU:
    # Other modules of torchtitan copy both when they are imported, so this comes first.
    utils.device_type, utils.device_module = "cpu", Processors

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.checkpointer.dcp import AsyncMode  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.config import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.config.configs import CommConfig, DebugConfig  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.distributed.activation_checkpoint import SelectiveAC  # noqa: E402
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, VarlenAttention  # noqa: E402
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config  # noqa: E402
from torchtitan.models.common.param_init import skip_param_init  # noqa: E402
from torchtitan.models.llama3 import Llama3Model, parallelize_llama  # noqa: E402
from torchtitan.models.llama3.model import Llama3TransformerBlock  # noqa: E402
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from fmops.adapters import ranks  # noqa: E402
from fmops.adapters.packing import (  # noqa: E402
    IGNORED,
    Block,
    Plan,
    PlannedBlocks,
    deal,
    labels_of,
    positions_of,
    read_blocks,
)
from fmops.faults import fault_site  # noqa: E402

if not hasattr(torch.distributed, "set_timeout"):
    # torch 2.13 cannot shorten a group's timeout once training runs, so that of the start stays.
    dist_utils.set_pg_timeouts = lambda **_: None
EXIT_OUT_OF_MEMORY = 5
"""As `fmops.errors.EXIT_MEMORY`, which this environment need not have."""


class DocumentAttention(VarlenAttention):  # type: ignore[misc]
    """Each document by itself through SDPA, in the arithmetic it is given: for processors."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):  # type: ignore[misc]
        """No settings."""

    # torchtitan shards these by their names.
    def forward(
        self, q_BLNH: Any, k_BLNH: Any, v_BLNH: Any, *, attention_masks: Any, scale: float | None = None, **given: Any
    ) -> Any:
        """[batch, tokens, heads, size] each; returns the shape of the queries."""
        bounds = attention_masks.cu_seq_q.tolist()
        flat = [tensor.reshape(-1, *tensor.shape[2:]).transpose(0, 1)[None] for tensor in (q_BLNH, k_BLNH, v_BLNH)]
        grouped = bool(given.get("enable_gqa", False))
        parts = []
        for start, end in pairwise(bounds):
            query, key, value = (tensor[:, :, start:end] for tensor in flat)
            attend = nn.functional.scaled_dot_product_attention
            parts.append(attend(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped))
        return torch.cat(parts, dim=2)[0].transpose(0, 1).reshape(q_BLNH.shape)


class PlannedRows(BaseDataLoader):  # type: ignore[misc]
    """The plan's blocks as rows of equal length, dealt to the ranks as every other trainer of ours deals them."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """Which job."""

        job: str

    def __init__(
        self, config: Config, *, dp_rank: int, dp_world_size: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        job = json.loads(Path(config.job).read_text())
        self._rows, self._row_tokens = local_batch_size, seq_len
        plan = Plan(**{**job["plan"], "order": tuple(job["plan"]["order"])})
        self._blocks = PlannedBlocks(read_blocks([Path(shard) for shard in job["shards"]]), plan)
        self._dealt = deal(plan, micro=local_batch_size, rank=dp_rank, world=dp_world_size)
        # torchtitan reads equally many micro-batches in every step; the last step may have fewer blocks.
        self._dealt += [[] for _ in range(-len(self._dealt) % job["accumulate"])]
        self._read = 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while self._read < len(self._dealt):
            places = self._dealt[self._read]
            self._read += 1
            rows = [self._row(self._blocks[place]) for place in places]
            rows += [self._row(None) for _ in range(self._rows - len(rows))]
            ids, positions, labels = (torch.stack([row[part] for row in rows]) for part in range(3))
            yield {"input": ids, "positions": positions}, labels

    def _row(self, block: Block | None) -> tuple[torch.Tensor, ...]:
        """[row_tokens] ids, positions, labels; what fills a row up is a document of its own with nothing to learn."""
        ids = torch.zeros(self._row_tokens, dtype=torch.int64)
        labels = torch.full((self._row_tokens,), IGNORED)
        size = 0 if block is None else len(block.input_ids)
        lengths = (*(() if block is None else block.lengths), self._row_tokens - size)
        if block is not None:
            ids[:size] = torch.from_numpy(block.input_ids.astype("int64"))
            # torchtitan compares each position with its own label: what the next token is.
            labels[: size - 1] = torch.from_numpy(labels_of(block))[1:]
        return ids, torch.from_numpy(positions_of(lengths)), labels

    def state_dict(self) -> dict[str, Any]:
        return {"read": self._read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._read = state_dict["read"]


class Reports(MetricsProcessor):  # type: ignore[misc]
    """Reports each step to who started the job."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        """As torchtitan's."""

    def log(self, step: int, global_avg_loss: float, *given: Any, **named: Any) -> None:
        if ranks.rank() == 0:
            report({"event": "step", "step": step, "loss": global_avg_loss})
        super().log(step, global_avg_loss, *given, **named)
        fault_site("step")


def report(event: dict[str, Any]) -> None:
    """One JSON line to who started the job."""
    REPORTS.write(json.dumps(event) + "\n")
    REPORTS.flush()


def parallelize(model: Any, **given: Any) -> Any:
    """As torchtitan does; gloo cannot scale while it sums, and nothing is scaled here."""
    made = parallelize_llama(model, **given)
    for module in made.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return made


def model_spec(shape: dict[str, Any]) -> ModelSpec:
    """A Llama of this shape as torchtitan builds it. Every weight is loaded, so how it is initialised does not show."""
    init = {"weight": nn.init.ones_}
    dim, vocabulary = shape["hidden"], shape["vocabulary"]
    norm = partial(RMSNorm.Config, normalized_shape=dim, eps=shape["epsilon"], param_init=init)
    rope = ComplexRoPE.Config(dim=shape["head"], max_seq_len=shape["context"], theta=shape["theta"], **shape["scaling"])
    layers = [
        Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=dim,
                n_heads=shape["heads"],
                n_kv_heads=shape["key_heads"],
                wqkv_param_init=init,
                wo_param_init=init,
                inner_attention=FlexAttention.Config() if ON_GPU else DocumentAttention.Config(),
                fuse_qkv=True,
                rope=rope,
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=shape["feed_forward"], w1_param_init=init, w2w3_param_init=init
            ),
        )
        for _ in range(shape["layers"])
    ]
    model = Llama3Model.Config(
        dim=dim,
        vocab_size=vocabulary,
        enable_weight_tying=shape["tied"],
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary,
            embedding_dim=dim,
            param_init={"weight": skip_param_init} if shape["tied"] else init,
        ),
        norm=norm(),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=init),
        layers=layers,
    )
    return ModelSpec(
        name="llama3",
        flavor="fmops",
        model=model,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )


def configure(job: dict[str, Any], path: Path) -> Trainer.Config:
    """The whole run as torchtitan's own config."""
    spec = model_spec(job["shape"])
    loss = CrossEntropyLoss.Config(global_vocab_size=job["shape"]["vocabulary"])
    rate = {"lr": job["learning_rate"], "weight_decay": job["weight_decay"]}
    return Trainer.Config(
        model_spec=spec,
        hf_assets_path=job["source"],
        dump_folder=str(path.parent),
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        optimizer=default_adamw(**rate),
        lr_scheduler=LRSchedulersContainer.Config(**job["schedule"], decay_type="linear"),
        training=TrainingConfig(**job["training"], disable_cuda_graphs=not ON_GPU),
        parallelism=ParallelismConfig(**job["parallelism"]),
        dataloader=PlannedRows.Config(job=str(path)),
        metrics=Reports.Config(log_freq=1, disable_color_printing=True),
        activation_checkpoint=SelectiveAC.Config() if ON_GPU else None,
        comm=CommConfig(trace_buf_size=0),
        debug=DebugConfig(seed=job["seed"], deterministic=True),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=job["save_every"],
            keep_latest_k=2,
            initial_load_path=job["source"],
            initial_load_in_hf=True,
            last_save_model_only=False,
        ),
    )


def main(path: Path) -> None:
    """Train to the end of the plan, from the newest resume state; leave the weights in `export/` beside the job."""
    from torchtitan.tools.logging import init_logger

    init_logger()
    job = json.loads(path.read_text())
    torch.set_num_threads(job["threads"])
    trainer = configure(job, path).build()
    try:
        trainer.train()
        keeper = trainer.checkpointer
        weights = keeper.states["model"].state_dict()
        keeper.dcp_save(weights, str(path.with_name("export")), AsyncMode.DISABLED, to_hf=True)
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()


def why(error: Exception) -> dict[str, Any] | None:
    """What ended this rank, for who started the job; nothing where another rank's end is the cause."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text[0]:
        return {"event": "failed", "error": f"out of memory: {text[0]}", "code": EXIT_OUT_OF_MEMORY}
    if ranks.lost_another(error):
        return None
    return {"event": "failed", "error": text[0], "code": 1}


REPORTS = sys.stdout

if __name__ == "__main__":
    # torchtitan and its libraries print to standard output; that belongs to the reports.
    REPORTS = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        main(Path(sys.argv[1]))
    except Exception as reason:
        told = why(reason)
        if told:
            report(told)
        raise
    if os.environ["RANK"] == "0":
        report({"event": "ended"})
