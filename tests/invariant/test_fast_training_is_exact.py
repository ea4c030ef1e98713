"""The fast ways of training compute what the plain ways compute: loss and every gradient, to 1e-5 in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmops.adapters import linear_loss
from fmops.adapters.document_attention import _varlen, attend_by_document, takes_varlen
from fmops.adapters.learnt_rows import finish_learnt_rows
from fmops.adapters.linear_loss import learn_without_logits
from fmops.adapters.model_files import add_lora, load_model, lora_config
from fmops.adapters.packing import Block, collate, micro_batch, pack, plan_training
from fmops.adapters.shared_prefix import share, share_prefixes
from fmops.errors import FmopsError

SIZES = (17, 40, 5, 2, 33, 1, 9)


def _pieces(*, half_learnt: bool) -> list[Block]:
    rng = np.random.default_rng(0)
    return [
        Block(
            rng.integers(3, 2000, size).astype(np.int32),
            (size,),
            np.arange(size) >= size // 2 if half_learnt else None,
        )
        for size in SIZES
    ]


def _gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < 1e-5, name


def _fast(tiny_model, said: list[str]):
    model = load_model(tiny_model)
    assert attend_by_document(model, note=said.append)
    assert learn_without_logits(model, note=said.append)
    return model


@pytest.mark.parametrize("half_learnt", [False, True])
def test_documents_without_mask_and_logits_learn_the_same(half_learnt, tiny_model):
    batch = collate(pack(_pieces(half_learnt=half_learnt), block_tokens=64))
    plain, said = load_model(tiny_model), []
    fast = _fast(tiny_model, said)
    losses = []
    for model in (plain, fast):
        loss = model(**batch, num_items_in_batch=torch.tensor(40)).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - losses[1]) < 1e-5
    _assert_equal(_gradients(fast), _gradients(plain))
    assert said == []


def test_prompts_are_not_finished_in_the_last_layer_where_it_only_adds_its_feed_forward_part(tiny_model, monkeypatch):
    said: list[str] = []
    model = _fast(tiny_model, said)
    batch = collate(pack(_pieces(half_learnt=True), block_tokens=64))
    read: list[int] = []
    last = model.base_model.layers[-1]
    last.mlp.down_proj.register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))
    learnt = int((batch["labels"][:, 1:] != -100).sum())
    model(**batch).loss.backward()
    model(**{name: value for name, value in batch.items() if name != "labels"})
    assert read == [learnt, batch["input_ids"].shape[1]]
    # A layer that mixes tokens behind its attention needs them all.
    kind = type(last.mlp)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) + x.mean(dim=1, keepdim=True))
    other = load_model(tiny_model)
    assert not finish_learnt_rows(other)


def test_a_loss_is_good_for_one_backward_pass():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nats = linear_loss.total_nats(hidden, weight, torch.arange(6))
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        nats.backward()


def test_the_loss_is_the_same_however_many_logits_are_held(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (150, 50))
    labels = torch.randint(0, 50, (150,), generator=generator)
    labels[::7] = linear_loss.IGNORED
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum") / 3
    slopes = torch.autograd.grad(wanted, (hidden, weight))
    for held in (1, 2**24):
        monkeypatch.setattr(linear_loss, "CHUNK_BYTES", held)
        monkeypatch.setattr(linear_loss, "CACHED_ELEMENTS", 7 * held)
        found = linear_loss.total_nats(hidden, weight, labels) / 3
        assert abs(float((found - wanted).detach())) < 1e-4
        for slope, other in zip(torch.autograd.grad(found, (hidden, weight)), slopes, strict=True):
            assert (slope - other).abs().max() < 1e-5


def test_rows_of_a_batch_may_hold_different_documents(tiny_model):
    plain, fast = load_model(tiny_model).eval(), load_model(tiny_model).eval()
    attend_by_document(fast, note=pytest.fail)
    rows = [collate(pack(_pieces(half_learnt=False)[:n], block_tokens=128)) for n in (2, 3)]
    width = min(row["input_ids"].shape[1] for row in rows)
    batch = {key: torch.cat([row[key][:, :width] for row in rows]) for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        difference = plain(**batch, use_cache=False).logits - fast(**batch, use_cache=False).logits
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_micro_batch_with_nothing_to_learn_moves_nothing(adapter, tiny_model):
    model = _fast(tiny_model, [])
    if adapter == "lora":
        model = add_lora(model, rank=4)
    block = Block(np.arange(3, 20, dtype=np.int32), (17,), np.zeros(17, dtype=bool))
    loss = model(**collate([block]), num_items_in_batch=torch.tensor(8)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    found = _gradients(model)
    assert all(not gradient.any() for gradient in found.values())
    # Several processes wait for the gradient of every weight.
    assert found.keys() == {name for name, value in model.named_parameters() if value.requires_grad}


def test_bfloat16_keeps_the_loss_in_float32(tiny_model):
    model, plain = _fast(tiny_model, []), load_model(tiny_model)
    batch = collate(pack(_pieces(half_learnt=False), block_tokens=64))
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for each in (plain, model):
            losses.append(each(**batch).loss)
    assert losses[1].dtype == torch.float32
    assert abs(float((losses[0] - losses[1]).detach())) < 2e-3


def test_a_mask_a_cache_or_broken_positions_are_refused(tiny_model):
    model = load_model(tiny_model)
    attend_by_document(model, note=pytest.fail)
    ids = torch.arange(3, 9)[None]
    with pytest.raises(FmopsError, match="attention by document computes no sliding_window"):
        model(input_ids=ids, use_cache=False, sliding_window=4)
    with pytest.raises(FmopsError, match="begin at 0 in each document and rise by one"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 2, 3, 4]]), use_cache=False)


def test_models_that_are_not_plain_fall_back_and_say_so(tiny_model):
    model = load_model(tiny_model)
    model.config.sliding_window = 8
    said: list[str] = []
    assert not attend_by_document(model, note=said.append)
    assert model.config._attn_implementation == "sdpa"
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *call: torch.tanh(call[-1] / 30) * 0.03)
    assert not learn_without_logits(model, note=said.append)
    assert not share_prefixes(model, note=said.append)
    assert said == [
        "LlamaForCausalLM attends by more than causal softmax: packed rows keep their dense mask, slower",
        "LlamaForCausalLM has more than a matrix as its head: training computes its logits, slower",
        "LlamaForCausalLM is not plain enough to share prompts: each answer reads its own, slower",
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_fused_adapter_learns_what_peft_learns(precision, tiny_model):
    from peft import get_peft_model

    config = lora_config(rank=4)
    config._custom_modules = None
    torch.manual_seed(0)
    plain = get_peft_model(load_model(tiny_model), config)
    torch.manual_seed(0)
    fast = add_lora(load_model(tiny_model), rank=4)
    layers = {type(module).__name__ for name, module in fast.named_modules() if name.endswith("q_proj")}
    assert layers == {"FusedLinear"}
    batch = collate(pack(_pieces(half_learnt=False), block_tokens=64))
    found = []
    for model in (plain, fast):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        found.append((float(loss.detach()), _gradients(model)))
    if precision == "float32":
        assert abs(found[0][0] - found[1][0]) < 1e-5
        _assert_equal(found[1][1], found[0][1])
    else:
        # Both round; neither is the truth. They must agree as two roundings do.
        for name, gradient in found[0][1].items():
            assert (found[1][1][name] - gradient).norm() < 0.1 * gradient.norm(), name


PAIRS = [
    ([5, 6, 7, 8], [9, 10, 11], [12, 13]),
    ([20], [21, 22, 23, 24, 25], [21, 22, 30]),
    ([40, 41, 42], [43], [44, 45, 46, 47]),
]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_shared_prompts_give_trls_loss_and_gradients(adapter, tiny_model, tmp_path):
    found = []
    for shares in (False, True):
        trainer = _dpo(tiny_model, tmp_path, adapter=adapter, shares=shares)
        rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in PAIRS]
        if adapter == "full":
            rows = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in rows]
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        found.append((float(loss.detach()), _gradients(trainer.model)))
    assert abs(found[0][0] - found[1][0]) < 1e-5
    _assert_equal(found[1][1], found[0][1])


def _dpo(tiny_model, tmp_path, *, adapter: str, shares: bool):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from fmops.adapters.model_files import load_tokenizer
    from fmops.adapters.schedule import Schedule, arguments
    from fmops.adapters.trl_dpo import DpoTrainer

    model = load_model(tiny_model)
    options: dict = {}
    if shares:
        attend_by_document(model, note=pytest.fail)
        options = {"note": pytest.fail}
    common = arguments(
        work=tmp_path, steps=1, accumulate=1, schedule=Schedule(1e-3, 0.0, 0.0), dtype=torch.float32, seed=0
    )
    plain = type("Plain", (DPOTrainer,), {"_prepare_dataset": DpoTrainer._prepare_dataset})
    trainer = (DpoTrainer if shares else plain)(
        model=model,
        args=DPOConfig(**common, gradient_checkpointing=False, max_length=None, precompute_ref_log_probs=False),
        train_dataset=Dataset.from_list(
            [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), PAIRS[0], strict=True))]
        ),
        processing_class=load_tokenizer(tiny_model),
        ref_model=load_model(tiny_model) if adapter == "full" else None,
        peft_config=lora_config(rank=4) if adapter == "lora" else None,
        **options,
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if adapter == "full":
        trainer.precompute_ref_logps = True
    return trainer


def test_a_shared_prompt_is_read_once_and_no_padding_ever():
    rows = torch.tensor([[5, 6, 7, 9, 10], [5, 6, 7, 8, 0]])
    labels = torch.tensor([[-100, -100, -100, 9, 10], [-100, -100, -100, 8, -100]])
    batch = share(rows, [5, 4], labels)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.documents == ((3, 1, 0),)
    assert list(zip(batch.places.tolist(), batch.rows.tolist(), batch.columns.tolist(), strict=True)) == [
        (2, 0, 2),
        (3, 0, 3),
        (2, 1, 2),
    ]


def test_micro_batches_divide_the_step_and_depend_on_the_blocks_alone():
    plan = plan_training([512] * 40, tokens=40 * 512, batch_tokens=6144, seed=0)
    assert plan.blocks_per_step == 12
    assert micro_batch(plan, [512] * 40) == 2
    assert micro_batch(plan, [200] * 40) == 4
    assert micro_batch(plan, [9000] * 40) == 1


def test_a_gpu_takes_whole_documents_in_half_precision_through_variable_lengths():
    """The kernel itself has run on no GPU here; this is what it is given."""
    plain, shared = ((5,), (7,)), ((5,), (4, 2, 3))
    for dtype in (torch.bfloat16, torch.float16):
        assert takes_varlen("cuda", dtype, plain)
        assert not takes_varlen("cuda", dtype, shared)
    assert not takes_varlen("cuda", torch.float32, plain)
    assert not takes_varlen("cpu", torch.bfloat16, plain)


def test_variable_lengths_get_one_dtype_under_autocast(monkeypatch):
    """Positions leave queries and keys in float32, values are in what autocast computes in."""
    import torch.nn.attention.varlen as varlen

    given = []

    def attention(query, key, value, *_, **named):
        given.extend((query, key, value))
        return query

    monkeypatch.setattr(varlen, "varlen_attn", attention)
    query, key = torch.zeros(1, 4, 12, 8), torch.zeros(1, 2, 12, 8)
    found = _varlen(query, key, key.bfloat16(), [5, 7], None)
    assert {x.dtype for x in given} == {torch.bfloat16} == {found.dtype}
    assert found.shape == (1, 12, 4, 8)
