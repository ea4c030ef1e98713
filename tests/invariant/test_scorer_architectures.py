"""Any causal model scores and answers as in lm-evaluation-harness's `hf` backend, whatever its attention."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fmops.adapters.lm_eval_scorer import SharedPrefixLM

TOLERANCE = 1e-4
WORDS = ("the", "class", "object", "returns", "a", "value", "when", "called", "with", "no", "and", "raises", "error")
LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SHARING = {
    "a window in every layer": ("mistral", LLAMA | {"sliding_window": 7}),
    "a window in some layers": ("gemma3_text", LLAMA | {"head_dim": 16, "sliding_window": 7, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"
    ]}),
    "learnt places": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "learnt places from the third on": ("opt", {
        "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 64,
        "max_position_embeddings": 256,
    }),
    "experts": ("mixtral", LLAMA | {"num_local_experts": 4}),
}  # fmt: skip
ALONE = {
    "capped scores": ("gemma2", LLAMA | {"head_dim": 16, "sliding_window": 7}),
    "scores shifted by distance": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "a state instead of attention": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2}),
}


def request(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def written(tiny_model: Path, folder: Path, family: str, shape: dict) -> Path:
    """A random model of another architecture with the tiny model's tokenizer."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_model / "tokenizer_config.json", folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # Larger than a new model's: what a token attends to must show.
                weight.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [*SHARING, *ALONE])
def test_scores_and_answers_are_the_references(tiny_model, tmp_path, kind):
    folder = written(tiny_model, tmp_path / "model", *(SHARING | ALONE)[kind])
    ours = SharedPrefixLM(folder, threads=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # One at a time: some of these architectures read what a batch is padded with.
    theirs = HFLM(pretrained=model, tokenizer=ours.tokenizer, batch_size=1, device="cpu")
    assert ours.shares == (kind in SHARING)
    rng = random.Random(1)
    shots = text(rng, 20)
    requests = []
    for _ in range(4):
        question = f"{shots} {text(rng, rng.randint(1, 12))}"
        requests += [request("loglikelihood", question, " " + text(rng, rng.randint(1, 9))) for _ in range(3)]
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(mine, reference, strict=True)) < TOLERANCE
    assert [a[1] for a in mine] == [b[1] for b in reference]
    prompts = [(text(rng, words), {"until": [], "max_gen_toks": 9, "do_sample": False}) for words in (2, 30, 9, 14)]
    answers = theirs.generate_until([request("generate_until", a, dict(b)) for a, b in prompts], disable_tqdm=True)
    assert ours.generate_until([request("generate_until", *each) for each in prompts]) == answers
