"""How many accelerators a model gets: enough for its weights and its longest requests, cut evenly."""

from __future__ import annotations

import pytest

from fmops.deployment.replica import replica_for
from fmops.errors import FmopsError

SMOLLM = {
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
    "dtype": "float32",
}  # fmt: skip
LLAMA_8B = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = {
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "weight_bytes", "max_tokens", "gpus"),
    [
        (SMOLLM, 538_000_000, 2048, 1),
        # 16.1 GB of weights; a token's keys and values are 131,072 bytes: 2.1 GB for eight requests of 2,048.
        (LLAMA_8B, 16_060_000_000, 2048, 1),
        # 8.6 GB for eight requests of 8,192: no longer on one GPU of 24 GB.
        (LLAMA_8B, 16_060_000_000, 8192, 2),
        # 141 GB and 1.3 GB of keys and values: eight GPUs hold 157.
        (LLAMA_70B, 141_000_000_000, 512, 8),
    ],
)
def test_gpus_by_weights_and_requests(config, weight_bytes, max_tokens, gpus):
    found = replica_for(config, weight_bytes=weight_bytes, device="gpu", max_tokens=max_tokens)
    assert (found.accelerators, found.parallel) == (gpus, gpus)
    assert found.resources["limits"]["nvidia.com/gpu"] == str(gpus)
    assert found.memory_gib >= 8 + weight_bytes / 2**30


@pytest.mark.parametrize("device", ["gpu", "neuron"])
def test_a_small_replica_fits_the_smallest_node_beside_what_runs_on_every_node(device):
    # Nine heads are not cut over the two cores of a chip.
    config = SMOLLM if device == "gpu" else {**SMOLLM, "num_attention_heads": 32}
    found = replica_for(config, weight_bytes=538_000_000, device=device, max_tokens=2048)
    # g5.xlarge, g6.xlarge, inf2.xlarge: 4 vCPU and 16 GiB.
    assert found.cpu < 4
    assert found.memory_gib < 14


def test_a_chip_of_inferentia_takes_two_parts():
    found = replica_for(LLAMA_8B, weight_bytes=16_060_000_000, device="neuron", max_tokens=2048)
    assert (found.accelerators, found.parallel) == (1, 2)
    assert found.resources["requests"]["aws.amazon.com/neuron"] == "1"


def test_a_model_that_also_sees_is_sized_by_its_language_tower():
    seeing = {"dtype": "bfloat16", "vision_config": {"num_attention_heads": 12}, "text_config": LLAMA_8B}
    found = replica_for(seeing, weight_bytes=16_900_000_000, device="gpu", max_tokens=8192)
    assert (found.accelerators, found.parallel) == (2, 2)


def test_weights_are_counted_as_they_are_served():
    wide = {**LLAMA_8B, "dtype": "float32"}
    assert replica_for(wide, weight_bytes=32_120_000_000, device="gpu", max_tokens=2048).accelerators == 1


@pytest.mark.parametrize(
    ("config", "weight_bytes"), [(LLAMA_70B, 800_000_000_000), ({**SMOLLM, "dtype": "bfloat16"}, 100_000_000_000)]
)
def test_what_no_node_holds_is_said_with_its_size(config, weight_bytes):
    with pytest.raises(FmopsError, match=r"needs \d+ GB .*cannot be cut so\. Lower serve\.max_tokens"):
        replica_for(config, weight_bytes=weight_bytes, device="gpu", max_tokens=2048)
