"""Sizes and costs: what is published is met within 25 %, and what does not fit says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from fmops.errors import FmopsError
from fmops.orchestration import sizing
from fmops.orchestration.sizing import Load, Shape, Work, instance, instances

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SHAPES = {
    "Llama 3.1 8B": LLAMA_8B,
    "Llama 3.1 70B": LLAMA_8B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Llama 3.1 405B": LLAMA_8B
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "Olmo 3 7B": LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 100278},
    "Olmo 3 32B": LLAMA_8B
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40}
    | {"vocab_size": 100278, "head_dim": 128},
    # nanochat's feed-forward has two matrices of four times the hidden size: as much as three of 8/3.
    "nanochat d20": LLAMA_8B
    | {"hidden_size": 1280, "intermediate_size": 3413, "num_hidden_layers": 20, "num_attention_heads": 10}
    | {"num_key_value_heads": 10, "vocab_size": 65536},
    "Llama 2 7B": LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "Llama 2 13B": LLAMA_8B
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000},
    "Llama 2 34B": LLAMA_8B
    | {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64}
    | {"vocab_size": 32000},
    "SmolLM3 3B": LLAMA_8B
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
SHAPES["Llama 2 70B"] = SHAPES["Llama 3.1 70B"] | {"vocab_size": 32000}
H100 = instance("p5.48xlarge")
FP8 = H100.model_copy(update={"peak_tflops": 1979.0})
A100 = instance("p4d.24xlarge").model_copy(update={"memory_gib": 80.0})
# Rows of docs/sizing.md in order, by how they begin: shape, devices, sequence, sequences a batch, published tokens/s.
THROUGHPUT = [
    ("torchtitan, Llama 3.1 8B, 8 H100, FSDP, compiled", "Llama 3.1 8B", H100, 8, 8192, 16, 6667),
    ("the same on 128", "Llama 3.1 8B", H100, 128, 8192, 256, 6514),
    ("Olmo 3 7B", "Olmo 3 7B", H100, 512, 8192, 512, 7700),
    ("Olmo 3 32B", "Olmo 3 32B", H100, 1024, 8192, 1024, 1900),
    ("Llama 3.1 405B, 16,384 H100", "Llama 3.1 405B", H100, 16384, 8192, 2048, 400e12 / 2.524e12),
    ("nanochat d20", "nanochat d20", H100, 8, 2048, 256, 1_080_000 / 8),
    ("Llama 3.1 405B, 8,192 H100", "Llama 3.1 405B", H100, 8192, 8192, 2048, 430e12 / 2.524e12),
    ("Megatron-Bridge 25.11, Llama 3 8B", "Llama 3.1 8B", FP8, 8, 8192, 128, 14451),
    ("Megatron-Bridge 26.02, Llama 3 70B", "Llama 3.1 70B", FP8, 64, 8192, 256, 1621),
    ("Megatron-Bridge 26.02, Llama 3.1 405B", "Llama 3.1 405B", FP8, 1024, 8192, 1536, 311),
    ("NeMo AutoModel, Llama 3 8B, LoRA", "Llama 3.1 8B", H100, 1, 4096, 32, 12473),
    ("*missed:* torchtitan, Llama 3.1 8B", "Llama 3.1 8B", H100, 8, 8192, 16, 5762),
    ("*missed:* SmolLM3 3B", "SmolLM3 3B", H100, 384, 4096, 576, 11.2e12 / (384 * 24 * 86400)),
    ("*missed:* NeMo AutoModel, Llama 3 70B, LoRA", "Llama 3.1 70B", H100, 8, 4096, 32, 608),
]
# Shape, devices, sequence, trillions of tokens, million device hours of the model card.
HOURS = [
    ("Llama 2 7B", "Llama 2 7B", A100, 1024, 4096, 2.0, 0.18432),
    ("Llama 2 13B", "Llama 2 13B", A100, 1024, 4096, 2.0, 0.36864),
    ("Llama 2 34B", "Llama 2 34B", A100, 1024, 4096, 2.0, 1.038336),
    ("Llama 2 70B", "Llama 2 70B", A100, 1024, 4096, 2.0, 1.72032),
    ("Llama 3 70B", "Llama 3.1 70B", H100, 4096, 8192, 15.0, 6.4),
    ("Llama 3.1 405B, 15.6 trillion", "Llama 3.1 405B", H100, 16384, 8192, 15.6, 30.84),
    ("*missed:* Llama 3 8B", "Llama 3.1 8B", H100, 2048, 8192, 15.0, 1.3),
]
DOCS = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text(encoding="utf-8")


def is_in_the_docs(begins: str, published: float, here: float) -> None:
    """The one row that begins so states these figures, and is marked as missed if they differ by over a quarter."""
    (row,) = [line for line in DOCS.splitlines() if line.startswith(f"| {begins}") and line.count("|") == 5]
    stated = [float(cell.replace(",", "")) for cell in row.split("|")[2:5]]
    assert stated == pytest.approx([published, here, here / published], rel=0.01)
    assert ("missed" in begins) == (abs(here / published - 1) > 0.25)


def shape(name: str) -> Shape:
    return Shape.of(SHAPES[name])


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama 3.1 8B", 8.03),
        ("Llama 3.1 70B", 70.55),
        ("Llama 3.1 405B", 405.9),
        ("nanochat d20", 0.561),
        ("Llama 2 7B", 6.738),
        ("Llama 2 13B", 13.016),
        ("Llama 2 70B", 68.98),
        ("SmolLM3 3B", 3.075),
    ],
)
def test_parameters_are_those_of_the_model_card(name, billions):
    assert shape(name).parameters / 1e9 == pytest.approx(billions, rel=0.002)


# Megatron-Bridge 25.11, DGX-H100: model TFLOP/s over tokens/s, a device.
@pytest.mark.parametrize(
    ("name", "flops"),
    [("Llama 3.1 8B", 744e12 / 14451), ("Llama 3.1 70B", 719e12 / 1602), ("Llama 3.1 405B", 737e12 / 292)],
)
def test_operations_a_token_are_megatrons(name, flops):
    assert shape(name).training_flops(8192) == pytest.approx(flops, rel=0.002)


# NeMo AutoModel, the same quotient: frozen weights cost 4 and not 6.
@pytest.mark.parametrize(("name", "flops"), [("Llama 3.1 8B", 402e12 / 12473), ("Llama 3.1 70B", 176e12 / 608.4)])
def test_operations_a_token_of_lora_are_automodels(name, flops):
    assert shape(name).training_flops(4096, lora=True) == pytest.approx(flops, rel=0.04)


@pytest.mark.parametrize(("begins", "name", "on", "devices", "sequence", "sequences", "published"), THROUGHPUT)
def test_published_throughput_is_met_within_a_quarter_or_said_to_be_missed(
    begins, name, on, devices, sequence, sequences, published
):
    work = Work(1e12, sequence, sequences * sequence, lora="LoRA" in begins)
    size = sizing.training(shape(name), work, on, nodes=max(1, devices // 8), devices=devices)
    is_in_the_docs(begins, published, size.tokens_per_s / devices)


@pytest.mark.parametrize(("begins", "name", "on", "devices", "sequence", "trillions", "published"), HOURS)
def test_published_hours_are_met_within_a_quarter_or_said_to_be_missed(
    begins, name, on, devices, sequence, trillions, published
):
    work = Work(trillions * 1e12, sequence, 2**22 if on is A100 else 2048 * sequence)
    size = sizing.training(shape(name), work, on, nodes=devices // 8)
    is_in_the_docs(begins, published, size.hours * devices / 1e6)


def test_goodput_at_16384_devices_is_what_llama_3_reports():
    size = sizing.training(shape("Llama 3.1 405B"), Work(15.6e12, 8192, 2048 * 8192), H100, nodes=2048)
    assert size.goodput > 0.9  # «over 90 % effective training time»
    assert size.layout.bytes_per_device < 80 * sizing.GIB


def test_a_model_takes_more_devices_before_it_takes_more_tensor_parallelism():
    work = Work(1e9, 4096, 64 * 4096)
    small = sizing.training(shape("Llama 3.1 8B"), work, instance("p5.48xlarge"))
    assert (small.nodes, small.layout.tensor, small.layout.pipeline) == (1, 1, 1)
    large = sizing.training(shape("Llama 3.1 70B"), work, instance("p5.48xlarge"))
    assert large.nodes > small.nodes
    assert large.layout.bytes_per_device <= instance("p5.48xlarge").room


def test_a_batch_is_never_shared_by_more_replicas_than_it_has_sequences():
    work = Work(1e9, 4096, 4 * 4096)
    size = sizing.training(shape("Llama 3.1 8B"), work, instance("p5.48xlarge"), nodes=4)
    assert size is None or size.layout.replicas <= 4
    assert sizing.layout(shape("nanochat d20"), work, instance("p5.48xlarge"), devices=7) is None


def test_what_fits_nowhere_is_none_and_lora_fits_where_full_does_not():
    full, lora = Work(1e8, 1024, 8192), Work(1e8, 1024, 8192, lora=True)
    l4 = instance("g6e.xlarge")
    assert sizing.training(shape("Llama 3.1 8B"), full, l4, nodes=1) is None
    assert sizing.training(shape("Llama 3.1 8B"), lora, l4, nodes=1) is not None


@pytest.mark.parametrize("between_s", [600.0, 10_000.0, 1e6])
def test_the_interval_of_young_and_daly_is_near_the_best_of_all(between_s):
    def good(every_s: float) -> float:
        return sizing.goodput(every_s, checkpoint_s=5.0, between_failures_s=between_s, restart_s=60.0)

    best = max(good(5.0 * 1.1**power) for power in range(150) if 5.0 * 1.1**power < 100 * between_s)
    assert best - good(sizing.young_daly(5.0, between_s)) < 0.002


def test_goodput_is_what_a_simulation_of_failures_gives():
    from benchmarks.cluster import Run, simulate

    run = Run(devices=16384, checkpoint_s=5.0, restart_s=600.0, every_s=300.0, spare_nodes=10**6)
    seen = simulate(run, hours=24 * 200, seed=1)
    expected = sizing.goodput(
        300.0, checkpoint_s=5.0, between_failures_s=sizing.DEVICE_FAILURE_H * 3600 / 16384, restart_s=600.0
    )
    assert seen.goodput == pytest.approx(expected, abs=0.01)
    assert seen.failures == pytest.approx(200 / 54 * 419, rel=0.1)


def test_a_larger_load_takes_more_replicas_and_a_tighter_deadline_fewer_answers_at_a_time():
    p5 = instance("p5.48xlarge")
    one, many = (sizing.serving(shape("Llama 3.1 70B"), Load(rate), p5) for rate in (1, 100))
    assert many.replicas > one.replicas
    assert many.dollars_per_hour > one.dollars_per_hour
    quick = sizing.serving(shape("Llama 3.1 70B"), Load(1, token_s=0.03), p5)
    assert quick.slots < one.slots or quick.tensor > one.tensor
    assert sizing.serving(shape("Llama 3.1 405B"), Load(1), instance("g6.xlarge")) is None


def test_decoding_is_below_what_the_memory_could_read():
    p5 = instance("p5.48xlarge")
    size = sizing.serving(shape("Llama 3.1 8B"), Load(1), p5)
    steps = size.requests_per_s * 256 / size.slots
    assert steps * 2 * shape("Llama 3.1 8B").parameters < p5.memory_gb_s * 1e9


def test_prices_are_those_of_the_infrastructure():
    prices = yaml.safe_load((Path(__file__).parents[2] / "infra" / "costs.yaml").read_text())["prices"]
    assert {name: each.dollars_per_hour for name, each in instances().items()} == {
        name: prices[name] for name in instances()
    }


def test_unknown_names_and_shapes_are_refused_with_the_choices():
    with pytest.raises(FmopsError, match=r"unknown instance 'p5'.*p5\.48xlarge"):
        instance("p5")
    with pytest.raises(FmopsError, match="mixtral has 8 experts; only dense models are sized"):
        Shape.of({"model_type": "mixtral", "num_local_experts": 8})
    with pytest.raises(FmopsError, match=r"config\.json of a bert names no 'num_attention_heads'"):
        Shape.of({"model_type": "bert"})


def test_a_gguf_header_gives_the_shape_of_the_model_that_was_written(tmp_path, tiny_model):
    from fmops.adapters.gguf_header import read_config
    from fmops.adapters.gguf_writer import write_gguf

    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, file)
    expected = Shape.of(json.loads((tiny_model / "config.json").read_text()))
    assert Shape.of(read_config(file)) == expected
    assert math.isclose(expected.parameters, 1.0e6, rel_tol=0.2)
