"""Before any traffic: an engine that loads well but is not the release is refused (S07), on a real model over HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from contextlib import contextmanager

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmops.artifacts import Checkpoint, Release
from fmops.deployment.golden import answer_of, ask_golden
from fmops.deployment.release import release
from fmops.deployment.rollout.checks import before_traffic
from fmops.deployment.serving.app import build_app
from fmops.deployment.serving.engine import load_engine
from fmops.deployment.serving.service import Service
from fmops.jobs import ReleaseJob
from fmops.stage import StageContext
from fmops.store import file_entries


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory) -> Release:
    folder = tmp_path_factory.mktemp("rollout")
    shutil.copytree(tiny_model, folder / "align" / "model")
    checkpoint = Checkpoint(path=folder / "align", stage="align", parameters=1, trained_tokens=1)
    return release(
        ReleaseJob(name="tiny"), checkpoint=checkpoint, out=folder / "release",
        context=StageContext(stream=io.StringIO()),
    )  # fmt: skip


@contextmanager
def served(folder, max_tokens=1024):
    """A way to ask a real engine through its real HTTP application."""
    engine = load_engine("transformers", folder, max_tokens=max_tokens, threads=1)

    def ask(path, body):
        async def post():
            app = build_app(Service(engine, version="tiny@0"), name="tiny")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
                reply = await client.post(path, json=body, timeout=60)
                return answer_of(reply.status_code, reply.text)

        return asyncio.run(post())

    try:
        yield ask
    finally:
        engine.close()


def digests(made: Release) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in file_entries(made.path).items()}


def test_the_release_itself_passes(made):
    with served(made.model) as ask:
        golden = ask_golden(made, ask)
        assert golden.asked == 11
        assert golden.differ == ()
        assert before_traffic(made, digests(made), ask) == ()


def test_a_probe_that_the_spec_allows_no_room_for_is_left_out(made):
    with served(made.model, max_tokens=256) as ask:
        golden = ask_golden(made, ask)
        assert golden.asked == 10
        assert golden.differ == ()


def shuffled_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    order = torch.randperm(weights[name].shape[0], generator=torch.Generator().manual_seed(0))
    save_file({**weights, name: weights[name][order]}, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_tokenizer(folder):
    """Two tokens have changed places: a vocabulary of another training run."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    usual = [token for token in vocabulary if len(token) == 1 and token.isalpha()]
    numbers = [vocabulary[token] for token in usual]
    for token, number in zip(usual, numbers[1:] + numbers[:1], strict=True):
        vocabulary[token] = number
    path.write_text(json.dumps(tokenizer))


def wrong_template(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    template = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}### assistant\n"
    if (folder / "chat_template.jinja").is_file():
        (folder / "chat_template.jinja").write_text(template)
    else:
        path.write_text(json.dumps({**config, "chat_template": template}))


@pytest.mark.parametrize("damage", [shuffled_weights, wrong_tokenizer, wrong_template])
def test_what_loads_but_is_wrong_gets_no_traffic(made, tmp_path, damage):
    shutil.copytree(made.model, tmp_path / "model")
    damage(tmp_path / "model")
    with served(tmp_path / "model") as ask:
        (reason,) = before_traffic(made, digests(made), ask)
    assert "of 11 golden answers are not the certified ones: chat/question" in reason
