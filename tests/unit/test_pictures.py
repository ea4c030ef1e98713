"""A model that reads pictures: what may be shown, how it is kept, and what refuses it."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from PIL import Image

from fmops.artifacts import Checkpoint, Source, SourceFile
from fmops.deployment.serving.bodies import ChatBody, RequestError, parse_body
from fmops.errors import FmopsError
from fmops.pictures import NoPicture, from_url, to_url


def png(colour="red", size=(32, 32)):
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, "PNG")
    return held.getvalue()


RED, BLUE = (to_url("x.png", png(colour)) for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    from tiny_vlm import write_tiny_vlm

    return write_tiny_vlm(tmp_path_factory.mktemp("vlm") / "model")


def checkpoint(model):
    return Checkpoint(path=model.parent, stage="base", parameters=1, trained_tokens=0)


# What travels


def test_a_data_url_gives_back_the_file():
    assert from_url(RED) == png("red")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.com/cat.png", "addresses are not fetched"),
        ("file:///etc/passwd", "addresses are not fetched"),
        ("data:image/svg+xml;base64,AAAA", "is none"),
        ("data:image/png;base64,AAA", "base64 is broken"),
        ("data:image/png;base64," + "A" * 6_000_000, "is above 4194304"),
    ],
)
def test_what_is_no_picture_in_the_request_itself_is_refused(url, said):
    with pytest.raises(NoPicture, match=said):
        from_url(url)
    with pytest.raises(RequestError, match=said):
        chat(url)


def chat(*urls, text="What is it?"):
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"model": "m", "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]}
    return parse_body(body, ChatBody)


def test_a_request_shows_its_pictures_in_order_and_eight_at_most():
    [turn] = chat(RED, BLUE).messages
    assert (turn.pictures, turn.text) == ([RED, BLUE], "What is it?")
    with pytest.raises(RequestError, match="9 pictures are more than 8"):
        chat(*[RED] * 9)


def test_the_gateway_passes_pictures_on_and_traces_none():
    from fmops.deployment.serving.gateway.tracing import last_user_text

    body = chat(RED)
    assert body.messages[0].plain() == [
        {"type": "image_url", "image_url": {"url": RED}}, {"type": "text", "text": "What is it?"},
    ]  # fmt: skip
    assert last_user_text(body) == "[picture] What is it?"
    plain = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}
    assert parse_body(plain, ChatBody).messages[0].plain() == "a"


# What a model sees


def test_a_picture_takes_its_tokens_and_a_second_one_its_own(seeing):
    from fmops.adapters.eyes import Eyes, pictures_of

    eyes = Eyes(seeing)
    look = eyes.look(RED)
    assert look.ids.count(eyes.place) == 64 // 4
    ids, learnt = eyes.expand_learnt([7, eyes.place, 8], [False, False, True], [look])
    assert ids == [7, *look.ids, 8]
    assert learnt == [*[False] * (1 + len(look.ids)), True]
    with pytest.raises(NoPicture, match="2 pictures for 1 places"):
        eyes.expand([eyes.place], [look, look])
    batch = pictures_of([[look], [look, eyes.look(BLUE)]])
    assert batch["pixel_values"].shape == (2, 2, 3, 32, 32)
    assert not batch["pixel_attention_mask"][0, 1].any(), "the first row has one picture"


@pytest.mark.parametrize(
    ("content", "said"), [(b"no picture", "no picture file"), (png(size=(5000, 5000)), "5000 × 5000 is above")]
)
def test_a_file_that_is_no_picture_is_refused(seeing, content, said):
    from fmops.adapters.eyes import Eyes

    with pytest.raises(NoPicture, match=said):
        Eyes(seeing).look("data:image/png;base64," + base64.b64encode(content).decode())


def test_a_server_remembers_no_picture_of_anybody(seeing):
    from fmops.adapters.eyes import Eyes
    from fmops.adapters.serving_tokenizer import ServingTokenizer

    served = ServingTokenizer(seeing, max_tokens=256).eyes
    assert served.look(RED) is not served.look(RED)
    training = Eyes(seeing, remember=True)
    assert training.look(RED) is training.look(RED)


def test_the_language_tower_reads_what_the_whole_model_would(seeing):
    from fmops.adapters.eyes import Eyes, embed, load_seeing, pictures_of

    eyes, model = Eyes(seeing), load_seeing(seeing).eval()
    looks = [eyes.look(BLUE)]
    ids = eyes.expand([1, eyes.place, 40, 41], looks)
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids]), use_cache=False, **pictures_of([looks])).logits
        parts = model(inputs_embeds=embed(model, ids, looks)[None], use_cache=False).logits
        other = model(inputs_embeds=embed(model, ids, [eyes.look(RED)])[None], use_cache=False).logits
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(other, whole, atol=1e-3), "what is shown matters"


def test_the_server_answers_about_a_picture_as_the_trainer_would(seeing):
    from fmops.deployment.parity import PICTURE_PROBES, check_parity

    parity, probes = check_parity(seeing, seeing, engine="transformers", threads=1)
    assert parity.passed, parity.reasons
    assert {f"picture/{name}" for name in PICTURE_PROBES} <= {probe.name for probe in probes}


def test_a_server_that_sees_something_else_is_found_out(seeing, monkeypatch):
    from fmops.adapters import transformers_engine
    from fmops.deployment.parity import check_parity

    right = transformers_engine.embed
    monkeypatch.setattr(transformers_engine, "embed", lambda model, ids, looks: right(model, ids, looks).flip(0))
    parity, _ = check_parity(seeing, seeing, engine="transformers", threads=1)
    assert not parity.passed
    assert {reason.partition(":")[0] for reason in parity.reasons} == {"picture/one", "picture/two"}


def test_a_place_written_by_hand_is_text_and_shows_nothing(seeing):
    from fmops.adapters.serving_tokenizer import ServingTokenizer

    tokenizer = ServingTokenizer(seeing, max_tokens=256)
    ids = tokenizer.encode_chat([{"role": "user", "content": "<image>"}])
    assert tokenizer.eyes.place not in ids


def test_a_language_model_says_that_it_reads_no_pictures(tiny_model):
    from fmops.adapters.serving_tokenizer import ServingTokenizer
    from fmops.deployment.serving.engine import PromptError

    with pytest.raises(PromptError, match="this model reads no pictures"):
        ServingTokenizer(tiny_model, max_tokens=256).encode_chat([{"role": "user", "content": "x", "pictures": [RED]}])


# Stages


def rows(folder, *shown):
    """Rows that show pictures, and the pictures, as one source."""
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in/red.png").write_bytes(png("red"))
    (folder / "in/blue.png").write_bytes(png("blue"))
    lines = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "Colour?"}]},
                {"role": "assistant", "content": "one"},
            ]
        }
        for name in shown
    ]
    (folder / "in/rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from fmops.integrity import sha256

    files = tuple(
        SourceFile(path=path, name=f"in/{path.name}", sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted((folder / "in").iterdir())
    )
    return Source(uri="in", files=files)


def prepare(model, source, out, context):
    from fmops.data.conversations import prepare_conversations
    from fmops.jobs import ExampleJob

    out.mkdir()
    job = ExampleJob(redact=True, held_out=0.0, max_tokens=256)
    return prepare_conversations(job, base=checkpoint(model), source=source, out=out, context=context)


def test_conversations_keep_each_picture_once_under_its_digest(seeing, tmp_path, context):
    kept = prepare(seeing, rows(tmp_path, "red.png", "in/blue.png", "red.png"), tmp_path / "out", context)
    assert kept.conversations == 2, "the same question about the same picture comes once"
    lines = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    named = [line["messages"][0]["pictures"] for line in lines]
    assert [(tmp_path / "out" / name).read_bytes() for [name] in named] == [png("red"), png("blue")]


def test_a_picture_that_is_not_among_the_sources_is_refused(seeing, tmp_path, context):
    with pytest.raises(FmopsError, match=r"the picture 'green\.png', which fits 0 of the 2 picture files"):
        prepare(seeing, rows(tmp_path, "green.png"), tmp_path / "out", context)


def test_pictures_for_a_language_model_are_refused(tiny_model, tmp_path, context):
    with pytest.raises(FmopsError, match="the base model reads no pictures"):
        prepare(tiny_model, rows(tmp_path, "red.png"), tmp_path / "out", context)


def test_instruct_trains_every_weight_of_a_model_that_sees_or_none(seeing, tmp_path, context):
    from fmops.finetuning.instruct import instruct
    from fmops.lifecycle import Instruct

    conversations = prepare(seeing, rows(tmp_path, "red.png", "blue.png"), tmp_path / "out", context)
    with pytest.raises(FmopsError, match=r"set instruct\.adapter to full"):
        instruct(
            Instruct(adapter="lora"), checkpoint=checkpoint(seeing), conversations=conversations,
            out=tmp_path / "tuned", context=context,
        )  # fmt: skip


def test_pretraining_and_alignment_refuse_it_and_say_what_to_do(seeing):
    from fmops.adapters.model_files import load_model

    with pytest.raises(FmopsError, match=r"instruction tuning alone trains such a one.*Leave pretrain and align out"):
        load_model(seeing)


def test_documents_are_not_scored_with_it(seeing):
    from fmops.adapters.lm_eval_pictures import SeeingLM, open_model

    lm = open_model(seeing, threads=1)
    assert isinstance(lm, SeeingLM)
    with pytest.raises(FmopsError, match="Leave the suite out"):
        lm.loglikelihood_rolling([])


@pytest.fixture
def questions(tmp_path, context):
    """Two questions about one red and one blue picture, pinned."""
    from fmops.evaluation.benchmarks import prepare_benchmarks
    from fmops.jobs import BenchmarksJob

    suite = tmp_path / "suite.yaml"
    items = [{"picture": url, "choices": ["red", "blue"], "label": label} for label, url in enumerate((RED, BLUE))]
    task = {
        "items": items, "key": "picture", "metrics": ["acc"], "chat": True,
        "config": {
            "output_type": "multiple_choice", "doc_to_text": "<image>Colour?", "doc_to_choice": "choices",
            "doc_to_target": "label", "target_delimiter": "",
        },
    }  # fmt: skip
    stated = {
        "suite": "seen", "family": "seen", "about": "x", "margin": 0.1, "unit": "accuracy", "higher_is_better": True,
        "tasks": {"seen": task},
    }  # fmt: skip
    suite.write_text(json.dumps(stated))
    file = SourceFile(path=suite, name="suite.yaml", sha256="0" * 64, bytes=1)
    out = tmp_path / "benchmarks"
    return prepare_benchmarks(
        BenchmarksJob(suites=("suite.yaml",)), out=out, context=context, suite_0=Source(uri="x", files=(file,))
    )


def test_a_question_is_scored_with_its_picture_in_sight(seeing, questions, tmp_path, context):
    from fmops.evaluation.evaluate import evaluate
    from fmops.jobs import EvaluateJob

    (tmp_path / "out").mkdir()
    report = evaluate(
        EvaluateJob(), checkpoint=checkpoint(seeing), benchmarks=questions, out=tmp_path / "out", context=context
    )
    assert [metric.n for metric in report.metrics] == [2]
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len({row["prompt_sha256"] for row in rows}) == 2, "the same words about two pictures are two questions"
    assert rows[0]["slack"] != rows[1]["slack"], "and the model saw two"


def test_a_model_without_eyes_is_not_asked_about_pictures(tiny_model, questions, tmp_path, context):
    from fmops.evaluation.evaluate import evaluate
    from fmops.jobs import EvaluateJob

    (tmp_path / "out").mkdir()
    with pytest.raises(FmopsError, match=r"task seen shows pictures, and this model reads none\. Leave"):
        evaluate(
            EvaluateJob(),
            checkpoint=checkpoint(tiny_model),
            benchmarks=questions,
            out=tmp_path / "out",
            context=context,
        )
