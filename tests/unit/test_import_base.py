"""Any base model arrives in one shape, and nothing that could run code arrives at all."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from fmops.adapters.model_files import load_model, load_tokenizer
from fmops.artifacts import Source, SourceFile
from fmops.errors import FmopsError
from fmops.jobs import ImportJob
from fmops.pretraining.base import import_base


def source_of(folder: Path) -> Source:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return Source(
        uri=f"./{folder.name}",
        files=tuple(
            SourceFile(path=p, name=p.relative_to(folder).as_posix(), sha256="", bytes=p.stat().st_size) for p in files
        ),
    )


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "given")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_becomes_a_base_checkpoint(folder, tmp_path, context):
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    base = import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)
    assert base.licence == "apache-2.0"
    assert base.parameters == load_model(base.model).num_parameters()
    assert (base.model / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not (base.model / "README.md").exists()


def test_padding_never_ends_an_answer(folder, tmp_path, context):
    edit(folder / "tokenizer_config.json", pad_token="<|im_end|>", model_max_length=10**30)
    edit(folder / "config.json", pad_token_id=2)
    base = import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)
    tokenizer = load_tokenizer(base.model)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.model_max_length == 2048
    assert json.loads((base.model / "config.json").read_text())["pad_token_id"] == 0
    assert "padding is now <|endoftext|>" in context.stream.getvalue()


def test_a_tokenizer_without_any_padding_token_is_refused(folder, tmp_path, context):
    edit(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] == "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FmopsError, match="never learns to stop"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pytorch_model.bin may be a pickle"),
        ("adapter.pt", "adapter.pt may be a pickle"),
        ("model.safetensors", "not in the safetensors format, whatever its name says"),
    ],
)
def test_a_pickle_is_refused_unopened(name, said, folder, tmp_path, context):
    sprung = tmp_path / "sprung"
    (folder / name).write_bytes(pickle.dumps(Bomb(sprung)))
    with pytest.raises(FmopsError, match=said):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)
    assert not sprung.exists()


def test_code_in_a_model_is_refused(folder, tmp_path, context):
    (folder / "modeling_own.py").write_text("print('hello')")
    with pytest.raises(FmopsError, match=r"modeling_own\.py is code that would run"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_auto_map_is_refused(name, folder, tmp_path, context):
    edit(folder / name, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(FmopsError, match="brings its own code, which is never run"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


def test_a_short_download_is_noticed(folder, tmp_path, context):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FmopsError, match=r"bytes instead of \d+: fetch it again"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", r"is no model: neither a \.gguf file nor a config\.json"),
        ("tokenizer.json", r"lacks tokenizer\.json"),
        ("model.safetensors", "holds no weights in safetensors"),
    ],
)
def test_what_is_missing_is_named(name, said, folder, tmp_path, context):
    (folder / name).unlink()
    with pytest.raises(FmopsError, match=said):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


def test_a_missing_shard_is_named(folder, tmp_path, context):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FmopsError, match=r"lists model-00002-of-00002\.safetensors, which the source lacks"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


def test_an_architecture_that_is_no_language_model_is_refused(folder, tmp_path, context):
    edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(FmopsError, match="vit is no causal language model"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)


def test_gguf_gives_the_weights_and_token_ids_of_transformers_own_slow_path(tiny_model, tmp_path, context):
    """Parsing the header once is an optimisation; nothing else may differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given = tmp_path / "given"
    given.mkdir()
    write_gguf(tiny_model, given / "tiny.gguf")
    base = import_base(ImportJob(), source=source_of(given), out=tmp_path / "out", context=context)
    slow = AutoModelForCausalLM.from_pretrained(
        given, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True)
    )
    ours = load_model(base.model).state_dict()
    assert all((ours[name] == value).all() for name, value in slow.state_dict().items())
    slow_tokenizer = AutoTokenizer.from_pretrained(given, gguf_file="tiny.gguf")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text() + " naïve — 文字 🙂\r\n\t<|im_end|>"
    assert load_tokenizer(base.model)(text)["input_ids"] == slow_tokenizer(text)["input_ids"]
    assert base.licence == "mit-0"
    assert base.parameters == load_model(base.model).num_parameters()


def write_gguf(model: Path, out: Path) -> None:
    """The tiny model as a Llama GGUF in float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_license("mit-0")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for m in messages %}"])
def test_a_chat_template_that_breaks_or_breaks_out_is_refused_before_anything_is_trained(
    template, folder, tmp_path, context
):  # fmt: skip
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(FmopsError, match="chat template of the base model cannot be rendered"):
        import_base(ImportJob(), source=source_of(folder), out=tmp_path / "out", context=context)
