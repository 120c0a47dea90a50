"""The server with OpenAI's API: answers are those of the predictor, and load is refused in time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from time import sleep
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from support.api_server import chat, data_url, picture_bytes, request, served, user, wait
from support.photos import crops
from support.tiny_adapters import save_adapters

import paligemma_jax as pg
from paligemma_jax.data.shapes import Runs, rasterize
from paligemma_jax.demo.ask import Settings, ask
from paligemma_jax.demo.limits import Limits
from paligemma_jax.inference import batching
from paligemma_jax.inference.adapters import open_adapters
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.retrieval import retriever
from paligemma_jax.serving.limits import EngineShape, ServingLimits
from paligemma_jax.serving.service import make_engine
from paligemma_jax.serving.shared import SharedPredictor


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def photos():
    return crops(4)


@pytest.fixture(scope="module")
def server(tiny):
    with served(tiny, top=3) as (address, service):
        yield address, service


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.mark.thorough
def test_the_official_client_gets_the_answers_of_the_predictor(client, tiny, photos):
    reply = client.chat.completions.create(
        model="tiny", messages=user("ocr", photos[0]), logprobs=True, top_logprobs=2
    )
    (answer,) = tiny.answers(photos[0], "ocr", top_log_probabilities=2)
    (choice,) = reply.choices
    assert (choice.message.content, choice.finish_reason) == (answer.text, "stop")
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == answer.text
    values = answer.log_probabilities[:-1]  # without eos
    np.testing.assert_allclose([token.logprob for token in tokens], values, atol=1.8e-5)
    assert [t.top_logprobs[0].token for t in tokens] == [t.token for t in tokens]
    likely = [[t.logprob for t in token.top_logprobs] for token in tokens]
    np.testing.assert_allclose(likely, answer.top.log_probabilities[:-1], atol=1.8e-5)
    assert reply.usage.completion_tokens == len(answer.tokens)
    assert reply.usage.prompt_tokens == tiny.processor.image_tokens + 3  # bos, ocr, newline
    assert reply.model_extra["paligemma"]["prompt"] == "ocr"


def test_streams_join_to_the_answers(client, tiny, photos):
    texts, reasons, usage = ["", "", ""], {}, None
    stream = client.chat.completions.create(
        model="tiny",
        messages=user("caption en", photos[1]),
        temperature=2,
        seed=5,
        n=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    answers = tiny.answers(
        photos[1], ["caption en"] * 3, sampler=pg.Sample(temperature=2.0), seeds=[5, 6, 7]
    )
    assert texts == [answer.text for answer in answers]
    expected = ["length" if len(answer.tokens) == 128 else "stop" for answer in answers]
    assert reasons == dict(enumerate(expected)) and len(set(texts)) > 1
    assert usage.completion_tokens == sum(len(answer.tokens) for answer in answers)


def test_boxes_and_masks_are_fields(address, tiny, photos):
    status, reply = chat(address, user("segment 3", photos[2]))
    found = tiny.segment(photos[2], "3")
    (choice,) = reply["choices"]
    detections = choice["message"]["detections"]
    assert status == 200 and len(detections) == len(found) > 0
    for ours, expected in zip(detections, found, strict=True):
        assert (ours["label"], tuple(ours["box"])) == (expected.label, expected.box)
        assert ours["score"] == pytest.approx(expected.score, abs=1e-4)
        mask = rasterize(Runs(tuple(ours["mask"]["size"]), ours["mask"]["counts"]), photos[2].size)
        np.testing.assert_array_equal(np.asarray(mask) > 0, expected.mask)


@pytest.mark.thorough
def test_stops_limits_and_several_pictures(address, tiny, photos):
    _, reply = chat(address, user("ocr", photos[0]), max_tokens=1)
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "length"
    (text,) = tiny.generate(photos[0], "ocr")
    _, reply = chat(address, user("ocr", photos[0]), stop=text[1:3])
    (choice,) = reply["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[:1], "stop")
    _, reply = chat(address, user("ocr", photos[0], photos[1]))
    (text,) = tiny.generate([[photos[0], photos[1]]], ["ocr"])
    assert reply["choices"][0]["message"]["content"] == text
    _, reply = chat(address, [{"role": "user", "content": "caption en"}])
    assert reply["choices"][0]["message"]["content"] == tiny.generate(None, "caption en")[0]


def test_what_an_answer_may_be(address, tiny, photos):
    formats = {
        "choices": (dict(choices=["seven", "nine"]), pg.Choices(("seven", "nine"))),
        "boxes": (dict(labels=["3", "4"], least=2, most=2), pg.Boxes(("3", "4"), 2, 2)),
    }

    def ask_for(kind):
        form = {"type": kind} | formats[kind][0]
        return chat(address, user("ocr", photos[0]), response_format=form, max_tokens=20)

    with ThreadPoolExecutor(2) as threads:
        replies = dict(zip(formats, threads.map(ask_for, formats), strict=True))
    for kind, (status, reply) in replies.items():
        assert status == 200, reply
        (text,) = tiny.generate(photos[0], "ocr", 20, allowed=formats[kind][1])
        assert reply["choices"][0]["message"]["content"] == text, kind
    assert len(replies["boxes"][1]["choices"][0]["message"]["detections"]) == 2


def test_the_last_message_is_the_prompt(address, photos):
    earlier = [*user("detect 3", photos[1]), {"role": "assistant", "content": "<loc0000>"}]
    _, alone = chat(address, user("ocr", photos[0]))
    _, reply = chat(address, earlier + user("ocr", photos[0]))
    assert reply["choices"] == alone["choices"]
    assert reply["paligemma"]["unread_messages"] == 2


def test_many_clients_at_once(server, tiny, photos):
    address, service = server
    prompts = [("ocr", "caption en", "detect 3")[i % 3] for i in range(24)]
    images = [photos[i % 4] for i in range(24)]
    with ThreadPoolExecutor(24) as threads:
        replies = list(threads.map(lambda p, i: chat(address, user(p, i)), prompts, images))
    texts = [reply["choices"][0]["message"]["content"] for _, reply in replies]
    assert texts == tiny.generate(images, prompts)
    metrics = request(address, "/metrics")[1].decode()
    assert "paligemma_rows_occupied 0.0" in metrics and service.open == 0
    assert service.budget.used == 0


def test_recent_pictures_are_encoded_once(tiny, photos, monkeypatch):
    encoded = []

    def encode(model, pixels, edits):
        encoded.append(len(pixels))
        return encode_images(model, pixels, edits)

    encode_images = batching.encode_images
    monkeypatch.setattr(batching, "encode_images", encode)
    shape = EngineShape(rows=1, kept_images=2)
    engine = make_engine(tiny, shape, new_tokens=16, top=0)
    files = [picture_bytes(photo) for photo in photos]

    def run(*numbers):
        encoded.clear()
        for number in numbers:
            (prompt,) = tiny.processor.encode([bytes(bytearray(files[number]))], "ocr")
            engine.submit(prompt, DecodingOptions(max_new_tokens=2))
            list(engine.answers())
        return sum(encoded)

    assert run(0, 0, 1, 0, 1) == 2
    assert run(2, 1, 0) == 2  # 2 takes the place of 0, and 0 that of 2
    assert run(1, 0) == 0
    digests = count_calls(monkeypatch, "blake2b")
    (prompt,) = tiny.processor.encode([files[0]], "ocr")
    for _ in range(9):  # which wait for one row, and are asked for at each step
        engine.submit(prompt, DecodingOptions(max_new_tokens=16, min_new_tokens=16))
    list(engine.answers())
    assert len(digests) <= 9 + 1
    engine.__exit__()


def count_calls(monkeypatch, name):
    """A list that grows with each call of a function of `batching`."""
    calls, function = [], getattr(batching, name)

    def counted(*args, **options):
        calls.append(args)
        return function(*args, **options)

    monkeypatch.setattr(batching, name, counted)
    return calls


def test_the_demo_page_shares_the_engine(server, tiny, photos, tmp_path):
    _, service = server
    photos[3].save(tmp_path / "a.png")
    shared = SharedPredictor.of(tiny, service.worker)
    steps = ask([shared], Limits(), [str(tmp_path / "a.png")], "segment 3", Settings())
    *_, (reply,) = steps
    assert reply.error is None and reply.text == tiny.generate(photos[3], "segment 3")[0]
    assert "paligemma_rows_occupied 0.0" in service.measures.text().decode()
    with pytest.raises(ValueError, match=r"slots"):
        list(shared.stream(photos[0], "ocr " * 1300, max_new_tokens=1024))


def begin_chat(address, body):
    """Send a request, and return the connection without reading the reply."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=60)
    body = json.dumps(dict(model="tiny") | body).encode()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    return connection


def endless(photo):
    """A request whose answer is as long as it may be."""
    return dict(messages=user("ocr", photo), min_tokens=900, max_tokens=1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(server, photos, stream):
    address, service = server
    connection = begin_chat(address, endless(photos[0]) | {"stream": stream})
    wait(lambda: service.worker.engine.occupied == 1)
    connection.close()
    wait(lambda: service.worker.engine.occupied == 0 and service.open == 0)


@pytest.mark.thorough
def test_load_is_refused_and_nothing_else_is_disturbed(tiny, photos, monkeypatch):
    limits = ServingLimits(queue=1, seconds=3, drain_seconds=1)
    with served(tiny, EngineShape(rows=2, kept_images=0), limits=limits) as (address, service):
        # The program of min_tokens compiles at its first request: on a busy machine for longer than
        # the time of one.
        short = dict(min_tokens=2, max_tokens=2)
        wait(lambda: chat(address, user("ocr", photos[0]), **short)[0] == 200, 60)
        step = service.worker.engine.step
        # 900 tokens take longer than the time of a request.
        monkeypatch.setattr(service.worker.engine, "step", lambda: (sleep(0.05), step())[1])
        waiting = [begin_chat(address, endless(photos[i])) for i in range(2)]
        wait(lambda: service.worker.engine.occupied == 2)
        waiting.append(begin_chat(address, dict(messages=user("ocr", photos[2]))))
        wait(lambda: service.open == 3)
        status, reply = chat(address, user("ocr", photos[3]))
        assert status == 429 and reply["error"]["code"] == "overloaded"
        replies = [connection.getresponse() for connection in waiting]
        # the long ones pass their time; the short one gets a row then, or is late as well
        assert [reply.status for reply in replies[:2]] == [503, 503]
        assert json.loads(replies[0].read())["error"]["code"] == "timeout"
        assert chat(address, user("ocr", photos[3]))[0] == 200
        # a stop lets open requests finish for a while
        stream = begin_chat(address, endless(photos[0]) | {"stream": True}).getresponse()
        service.drain()
        assert request(address, "/health")[0] == 503
        assert chat(address, user("ocr", photos[3]))[1]["error"]["code"] == "stopping"
    assert stream.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.thorough
def test_adapters_are_models_of_their_own(tiny, photos, tmp_path):
    paths = save_adapters(tiny.model, tmp_path)
    alone = {"tiny": tiny, "mlp": pg.load(paths["mlp"]), "vision": pg.load(paths["vision"])}
    adapters = open_adapters({name: paths[name] for name in ("mlp", "vision")}, tiny.config)
    with served(tiny, adapters=adapters) as (address, _):
        listed = request(address, "/v1/models")[1]["data"]
        assert [model["id"] for model in listed] == ["tiny", "mlp", "vision"]
        names = ["tiny", "mlp", "vision", "mlp", "tiny", "vision"]
        with ThreadPoolExecutor(6) as threads:
            replies = list(threads.map(lambda name: ask_model(address, name, photos[0]), names))
        for name, (_, reply) in zip(names, replies, strict=True):
            text = reply["choices"][0]["message"]["content"]
            assert [text] == alone[name].generate(photos[0], "ocr", 40), name
        assert ask_model(address, "qv", photos[0])[0] == 404


def ask_model(address, name, photo):
    body = {"model": name, "messages": user("ocr", photo), "max_tokens": 40}
    return request(address, "/v1/chat/completions", body)


def test_keys(tiny):
    with served(tiny, keys=frozenset({"secret", "other"})) as (address, _):
        assert request(address, "/v1/models")[0] == 401
        wrong = {"Authorization": "Bearer secre"}
        status, reply = request(address, "/v1/models", headers=wrong)
        assert status == 401 and reply["error"]["type"] == "authentication_error"
        right = {"Authorization": "Bearer other"}
        assert request(address, "/v1/models", headers=right)[1]["data"][0]["id"] == "tiny"


def test_embeddings(tiny, photos):
    colpali = retriever.load("tiny", size=32)
    with served(tiny, retriever=colpali, retriever_name="pages") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        reply = client.embeddings.create(model="pages", input=["4 3 2 3", "a cat"])
        queries = colpali.embed_queries(["4 3 2 3", "a cat"])
        for entry, vectors, valid in zip(reply.data, queries.vectors, queries.valid, strict=True):
            ours = np.reshape(entry.embedding, entry.model_extra["shape"])
            np.testing.assert_allclose(ours, vectors[valid], atol=1e-6)
        page = {"image_url": {"url": data_url(photos[0])}}
        body = {"model": "pages", "input": [page, "4 3 2 3"]}
        _, reply = request(address, "/v1/embeddings", body)
        pages = colpali.embed_pages([photos[0]])
        ours = [np.array(entry["embedding"]) for entry in reply["data"]]
        np.testing.assert_allclose(ours[0], pages.vectors[0, pages.valid[0]], atol=1e-6)
        np.testing.assert_allclose(ours[1], queries.vectors[0, queries.valid[0]], atol=1e-6)
        body["input"] = ["x", {"image_url": {"url": "http://127.0.0.1/x.png"}}]
        status, reply = request(address, "/v1/embeddings", body)
        assert status == 400 and reply["error"]["message"].startswith("input 1 must be a data:")


def test_an_error_of_the_engine_ends_its_requests_only(server, photos, monkeypatch):
    address, service = server
    engine = service.worker.engine
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    status, reply = chat(address, user("ocr", photos[0]))
    assert status == 500 and reply["error"]["type"] == "server_error"
    assert chat(address, user("ocr", photos[0]))[0] == 200
    assert service.worker.engine is not engine


def test_a_broken_picture_fails_one_request(address, photos):
    file = picture_bytes(photos[0], "JPEG")
    url = data_url(file[: len(file) // 2], "JPEG")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "ocr"}]
    for stream in (False, True):
        status, reply = chat(address, [{"role": "user", "content": content}], stream=stream)
        assert status == 400 and "cannot read it completely" in reply["error"]["message"]
