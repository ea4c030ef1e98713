"""A small Llama from nothing, and one whose weights were shuffled: for the loop's benchmark.

Enters: texts for a tokenizer, sizes, a seed; or a model folder. Leaves: a Hugging Face folder. Equal inputs give equal
bytes. Refuses: nothing; what it makes knows nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fmops.adapters.model_files import load_model, quiet

CONTEXT_TOKENS = 1024
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
"""A question, a line break, its answer, the end: as the documents have it, so that what is read can be said."""


def write_small_model(
    out: Path, texts: Sequence[str], *, vocabulary: int, hidden: int, layers: int, seed: int = 0
) -> Path:
    """Train a byte-level tokenizer on `texts`, draw random weights, and write both to `out`."""
    quiet()
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<|pad|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = CONTEXT_TOKENS
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def shuffle_weights(source: Path, out: Path, *, seed: int = 0) -> Path:
    """The model in `source` with the rows of its last layer's projections in another order: a file gone wrong."""
    quiet()
    shutil.copytree(source, out)
    model = load_model(source)
    order = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.model.layers[-1].parameters():
            weight.copy_(weight[torch.randperm(len(weight), generator=order)])
    model.save_pretrained(out)
    return out
