"""A small vision-language model of SmolVLM's shape with random weights, its tokenizer, and its image processor.

Enters: an output folder. Leaves: a Hugging Face model folder (0.3 M parameters, pictures of 32 × 32 pixels).
Refuses: nothing; it knows nothing until it is tuned. A real one: HuggingFaceTB/SmolVLM-256M-Instruct.
"""

from __future__ import annotations

import sys
from pathlib import Path

SIDE, PATCH, FOLD = 32, 4, 2
"""Pixels of a picture's side, of a patch's, and patches along a side that become one token."""
PICTURE_TOKENS = (SIDE // PATCH // FOLD) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_vlm(out: Path, *, seed: int = 0) -> Path:
    """Write the model to `out` and return it. Equal seeds give equal bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        PreTrainedTokenizerFast,
    )  # fmt: skip
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>",
               "<end_of_utterance>", "<global-img>"]  # fmt: skip
    words = [
        "What colour is it? Is the ground light or dark? What is in the picture? red green blue yellow light dark",
        "system user assistant It is a in this that the and of to for with you are",
    ]
    raw.train_from_iterator(
        words * 20,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=1024,
    )  # fmt: skip
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
    )  # fmt: skip
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=PICTURE_TOKENS, chat_template=CHAT_TEMPLATE)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={
                "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 192,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                "tie_word_embeddings": True,
            },
            vision_config={
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": SIDE, "patch_size": PATCH,
            },
            scale_factor=FOLD, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


if __name__ == "__main__":
    print(write_tiny_vlm(Path(sys.argv[1])))
