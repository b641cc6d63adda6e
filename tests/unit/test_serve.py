"""`vilg serve`'s API over real sockets: what it draws and writes, its limits, and each mistake by name."""

import base64
import io
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from tests.export_support import write_export
from tests.model_support import tiny_config
from tests.serve_support import ANSWERS, CAPTIONS, IMAGES, occupied, running_server, until
from vilg.errors import UserError
from vilg.inference.generate import draw_images
from vilg.inference.load import load_model
from vilg.inference.sampling import SamplingConfig
from vilg.inference.serve.command import main
from vilg.inference.serve.requests import ImagesRequest
from vilg.inference.serve.work import Limits, plan_images
from vilg.inference.serve.worker import Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def running(folder):
    with running_server(folder, candidates=8, batch=3, megabytes=0.2, waiting=4) as server:
        yield server


def picture(mode: str = "RGB", size=(20, 24), form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, 40).save(content, format=form)
    return content.getvalue()


IMAGE = base64.b64encode(picture()).decode()


def opened(entry: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def test_pictures_are_those_that_the_model_draws_and_the_best_come_first(running, folder):
    status, body = running.post(IMAGES, {"prompt": "a cat", "n": 2, "candidates": 5, "seed": 7, "guidance": 2})
    assert status == 200 and body["seed"] == 7 and body["size"] == "16x16" and body["sampling"]["guidance"] == 2
    drawn, _ = draw_images(load_model(folder), ["a cat"], num=5, seed=7, sampling=SamplingConfig(guidance=2))
    assert len(body["data"]) == 2 and body["data"][0]["score"] >= body["data"][1]["score"]
    for entry in body["data"]:
        with opened(entry) as image:
            assert np.array_equal(np.asarray(image), drawn[0, entry["candidate"]])
            assert image.text["prompt"] == "a cat" and image.text["seed"] == "7"


def test_without_a_seed_each_request_draws_something_else_and_says_how_to_repeat_it(running):
    first, second = (running.post(IMAGES, {"prompt": "a cat"})[1] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = running.post(IMAGES, {"prompt": "a cat", "seed": first["seed"]})[1]
    assert again["data"] == first["data"]


def test_a_stream_counts_up_shows_half_drawn_pictures_and_ends_with_the_result(running):
    asked = {"prompt": "a cat", "n": 1, "candidates": 8, "seed": 3}
    events = running.stream(IMAGES, asked | {"partial_images": 1})
    with occupied(running):
        found = [next(events)]  # sent while the other work is still before it
    found += events
    *progress, last = found
    assert [event["type"] for event in found] == ["progress"] * len(progress) + ["completed"]
    assert progress[0]["ahead"] == 1
    done = [event["done"] for event in progress if event["total"]]
    assert done == sorted(done) and all(event["total"] in (0, 8 * 16) for event in progress)
    del last["type"], last["created"]
    plain = running.post(IMAGES, asked)[1]
    del plain["created"]
    assert last == plain


class FakeJob:
    """Notes what a job says of itself, and is to stop after `steps` of them."""

    def __init__(self, steps: int = 10_000):
        self.seen, self.steps = [], steps

    def check(self):
        if len(self.seen) == self.steps:
            raise Stopped

    def report(self, progress):
        self.seen.append(progress)


def test_half_drawn_pictures_hold_the_rows_drawn_so_far(running, folder):
    """Called as the worker calls it, since a stream may skip what comes faster than it is read."""
    request = ImagesRequest(prompt="a cat", n=5, stream=True, partial_images=3, seed=1)
    job = FakeJob()
    result = plan_images(load_model(folder), request, Limits(batch=3))(job)
    assert [p.done for p in job.seen] == [3 * n for n in range(1, 17)] + [48 + 2 * n for n in range(1, 17)]
    assert {p.total for p in job.seen} == {80}
    shown = {(p.first, len(p.previews), Image.open(io.BytesIO(p.previews[0])).height) for p in job.seen if p.previews}
    assert shown == {(0, 3, 4), (0, 3, 8), (0, 3, 12), (3, 2, 4), (3, 2, 8), (3, 2, 12)}
    assert len(result["data"]) == 5


@pytest.mark.gpu
def test_on_a_gpu_progress_is_that_of_the_kernels_and_work_stops_in_its_midst(tmp_path):
    wide = tiny_config(hidden_size=64, num_heads=2)  # the kernels take heads of 32 channels
    bundle = load_model(write_export(tmp_path, config=wide), device="cuda")
    request = ImagesRequest(prompt="a cat", n=4, stream=True, partial_images=1, seed=1)
    job = FakeJob()
    assert len(plan_images(bundle, request, Limits())(job)["data"]) == 4
    assert [p.done for p in job.seen] == [4 * n for n in range(1, 17)] and len(job.seen[-1].previews) == 4
    stopped = FakeJob(steps=5)
    with pytest.raises(Stopped):
        plan_images(bundle, request, Limits())(stopped)
    assert len(stopped.seen) == 5
    plan_images(bundle, request, Limits())(FakeJob())  # and can begin anew


@pytest.mark.parametrize("form", ["base64", "data URL", "file"])
@pytest.mark.parametrize("path", [CAPTIONS, ANSWERS])
def test_captions_and_answers_take_a_picture_in_each_form(running, path, form):
    fields = {"language": "zh", "question": "a cat"} if path == ANSWERS else {"language": "zh"}
    if form == "file":
        parts = [f'--edge\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
        parts.append(b'--edge\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n' + picture() + b"\r\n--edge--\r\n")
        status, body, _ = running.request("POST", path, b"".join(parts), {"Content-Type": "multipart/form-data; boundary=edge"})
    else:
        image = f"data:image/png;base64,{IMAGE}" if form == "data URL" else IMAGE
        status, body = running.post(path, fields | {"image": image})
    assert status == 200, body
    text = body["answer" if path == ANSWERS else "caption"]
    assert isinstance(text, str) and not any(c.isascii() and c.isalpha() for c in text)
    again = running.post(path, fields | {"image": IMAGE, "num_beams": 3})
    assert again[0] == 200


@pytest.mark.parametrize(
    "image",
    [picture("CMYK", form="JPEG"), picture("I;16"), picture("RGBA"), picture(size=(1, 1)), picture("L", form="WEBP")],
    ids=["CMYK", "16 bit", "alpha", "1 x 1", "grey WebP"],
)
def test_unusual_pictures_are_read(running, image):
    assert running.post(CAPTIONS, {"image": base64.b64encode(image).decode()})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (IMAGES, {}, "prompt", "prompt is missing: what the picture shows"),
        (IMAGES, {"prompt": ""}, "prompt", "is empty"),
        (IMAGES, {"prompt": "猫" * 7}, "prompt", "the text segment has room for 6"),
        (IMAGES, {"prompt": "\ud800"}, "prompt", "is empty"),
        (IMAGES, {"prompt": 5}, "prompt", "valid string"),
        (IMAGES, {"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        (IMAGES, {"prompt": "a", "n": 9}, "n", "n=9: draw between n=9 and 8 candidates"),
        (IMAGES, {"prompt": "a", "n": 3, "candidates": 2}, "candidates", "candidates=2: draw between n=3 and 8"),
        (IMAGES, {"prompt": "a", "candidates": 0}, "candidates", "greater than or equal to 1"),
        (IMAGES, {"prompt": "a", "guidance": -1}, "guidance", "guidance=-1.0: must be at least 0"),
        (IMAGES, {"prompt": "a", "guidance": float("nan")}, "guidance", "finite"),
        (IMAGES, {"prompt": "a", "guidance": 1e308}, "guidance", "at most 100"),
        (IMAGES, {"prompt": "a", "guidance_start": 1e39}, "guidance_start", "at most 100"),
        (IMAGES, {"prompt": "a", "temperature": 1e-320}, "temperature", "at least 0.001"),
        (IMAGES, {"prompt": "a", "temperature": 0, "top_p": 0.5}, "top_p", "temperature=0 is greedy"),
        (IMAGES, {"prompt": "a", "top_p": 0}, "top_p", "must be above 0"),
        (IMAGES, {"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        (IMAGES, {"prompt": "a", "size": "512x512"}, "size", "this model draws 16x16"),
        (IMAGES, {"prompt": "a", "response_format": "url"}, "response_format", "b64_json"),
        (IMAGES, {"prompt": "a", "guidence": 2}, "guidence", "unknown field; did you mean 'guidance'?"),
        (IMAGES, {"promt": "a"}, "promt", "unknown field; did you mean 'prompt'?"),
        (IMAGES, ["a"], None, "one JSON object, not a list"),
        (CAPTIONS, {}, "image", "image is missing"),
        (CAPTIONS, {"image": "%%%"}, "image", "neither base64 nor"),
        (CAPTIONS, {"image": ""}, "image", "not a readable JPEG, PNG or WebP"),
        (CAPTIONS, {"image": base64.b64encode(b"hello").decode()}, "image", "not a readable JPEG, PNG or WebP"),
        (CAPTIONS, {"image": base64.b64encode(picture(form="GIF")).decode()}, "image", "at least one pixel: it is a GIF"),
        (CAPTIONS, {"image": base64.b64encode(picture()[:60]).decode()}, "image", "not a readable JPEG, PNG or WebP"),
        (CAPTIONS, {"image": IMAGE, "language": "fr"}, "language", "'zh' or 'en'"),
        (CAPTIONS, {"image": IMAGE, "num_beams": 0}, "num_beams", "greater than or equal to 1"),
        (CAPTIONS, {"image": IMAGE, "num_beams": 2, "temperature": 1}, "num_beams", "choose one"),
        (CAPTIONS, {"image": IMAGE, "num_beams": 17}, "num_beams", "less than or equal to 16"),
        (CAPTIONS, {"image": IMAGE, "num_beams": 2, "length_penalty": 1e308}, "length_penalty", "at most 10"),
        (CAPTIONS, {"image": IMAGE, "length_penalty": 3}, "length_penalty", "give num_beams above 1"),
        (CAPTIONS, {"image": IMAGE, "temperature": 1e-320}, "temperature", "at least 0.001"),
        (CAPTIONS, {"image": IMAGE, "temperature": -1}, "temperature", "must be 0 (greedy), or at least 0.001 and at most 1000"),
        (ANSWERS, {"image": IMAGE}, "question", "question is missing"),
        (ANSWERS, {"image": IMAGE, "question": " "}, "question", "is empty"),
        (ANSWERS, {"image": IMAGE, "question": "猫" * 7}, "question", "has room for 4"),
    ],
)
def test_a_request_that_cannot_be_done_names_the_field_and_what_would_work(running, path, body, param, message):
    status, found = running.post(path, body)
    assert status == 400, found
    error = found["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and message in error["message"]
    if isinstance(body, dict):  # before the stream begins, so that the status says it
        assert running.post(path, body | {"stream": True})[0] == 400


def test_a_text_that_does_not_fit_is_cut_on_request(running):
    for path, name, field, room in ((IMAGES, "prompt", "drawn_text", 6), (ANSWERS, "question", "asked_text", 4)):
        asked = {name: "猫" * 7, "truncate": True} | ({"image": IMAGE} if path == ANSWERS else {})
        status, body = running.post(path, asked)
        assert status == 200 and body["truncated"] is True and body[field] == "猫" * len(body[field])
        assert 1 <= len(body[field]) <= room
    drawn = running.post(IMAGES, {"prompt": "猫" * 7, "truncate": True})[1]
    assert opened(drawn["data"][0]).text["drawn_text"] == drawn["drawn_text"]
    assert "truncated" not in running.post(IMAGES, {"prompt": "猫", "truncate": True})[1]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", IMAGES, b"{", {"Content-Type": "application/json"}, 400, "invalid_json"),
        ("POST", IMAGES, b"[" * 50_000, {"Content-Type": "application/json"}, 400, "invalid_json"),
        ("POST", IMAGES, b"\xff", {"Content-Type": "application/json"}, 400, "invalid_json"),
        ("POST", CAPTIONS, b"hello", {"Content-Type": "multipart/form-data"}, 400, "invalid_form"),
        ("POST", CAPTIONS, b"hello", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "invalid_form"),
        ("POST", IMAGES, b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", CAPTIONS, {"image": "A" * 300_000}, {}, 413, "request_entity_too_large"),
        ("POST", IMAGES, {"prompt": "a", "model": "gpt"}, {}, 404, "model_not_found"),
        ("GET", "/v1/nothing", None, {}, 404, "not_found"),
        ("GET", IMAGES, None, {}, 405, "method_not_allowed"),
        ("GET", "/", None, {"Host": "evil.example"}, 403, "forbidden_host"),
        ("GET", "/", None, {"Host": "[::1"}, 403, "forbidden_host"),
        ("POST", IMAGES, {"prompt": "a"}, {"Origin": "https://evil.example"}, 403, "forbidden_origin"),
    ],
)
def test_what_is_no_request_to_this_server_is_refused_as_json(running, method, path, body, headers, status, code):
    found, content, sent = running.request(method, path, body, headers)
    assert (found, content["error"]["code"]) == (status, code), content
    assert content["error"]["message"] and "default-src 'none'" in sent["Content-Security-Policy"]


def test_a_full_queue_refuses_at_once_and_empties_again(folder):
    with running_server(folder, waiting=1) as running:
        with occupied(running):
            # Each of the two places, the one for work and the one to wait, is taken by a request that has to wait.
            askers = [threading.Thread(target=running.post, args=(IMAGES, {"prompt": "a cat"})) for _ in range(2)]
            for asker in askers:
                asker.start()
            until(lambda: len(running.server.worker._line) == 2)
            status, body, headers = running.request("POST", IMAGES, {"prompt": "a cat"})
            assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "queue_full", "5")
            assert running.request("GET", "/health")[0] == 200
        for asker in askers:
            asker.join()
        assert running.post(IMAGES, {"prompt": "a cat"})[0] == 200


def test_a_request_that_waits_too_long_times_out_and_leaves_the_queue(folder):
    with running_server(folder, timeout=0.3) as running, occupied(running):
        status, body = running.post(IMAGES, {"prompt": "a cat"})
        assert (status, body["error"]["code"]) == (504, "timeout")
        events = list(running.stream(IMAGES, {"prompt": "a cat"}))
        assert events[0]["ahead"] == 1 and events[-1]["error"]["code"] == "timeout"
        assert not running.server.worker._line


def test_a_drawing_that_takes_too_long_is_stopped_in_its_midst(folder):
    with running_server(folder, timeout=1.0, candidates=100_000, batch=4) as running:
        assert running.post(IMAGES, {"prompt": "a cat", "n": 1, "candidates": 100_000})[0] == 504
        until(lambda: running.server.worker.idle)  # it would have drawn for minutes
        assert running.post(IMAGES, {"prompt": "a cat"})[0] == 200


def test_the_work_of_a_client_that_left_is_stopped(folder):
    with running_server(folder, candidates=100_000, batch=4) as running:
        running.leave_after_sending(IMAGES, {"prompt": "a cat", "candidates": 100_000})
        until(lambda: any("left by the client" in line for line in running.log))
        until(lambda: running.server.worker.idle)


def test_a_server_that_stops_lets_no_work_go_on(folder):
    found = []
    with running_server(folder, candidates=100_000, batch=4) as running:
        body = {"prompt": "a cat", "candidates": 100_000}
        askers = [threading.Thread(target=lambda: found.append(running.post(IMAGES, body))) for _ in range(2)]
        for asker in askers:
            asker.start()
        worker = running.server.worker  # one drawn, one waiting: the first may stand in the line alone for a moment
        until(lambda: worker._running is not None and worker._line)
    for asker in askers:
        asker.join(10)
    assert [(status, body["error"]["code"]) for status, body in found] == [(503, "stopping")] * 2
    assert not running.server.worker._thread.is_alive()


def test_a_failure_of_ours_is_told_apart_and_the_server_lives_on(running, monkeypatch, capsys):
    def broken(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("vilg.inference.serve.work.draw_images", broken)
    status, body = running.post(IMAGES, {"prompt": "a cat"})
    assert (status, body["error"]["type"]) == (500, "server_error") and "ZeroDivision" not in str(body)
    assert list(running.stream(IMAGES, {"prompt": "a cat"}))[-1]["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.undo()
    assert running.post(IMAGES, {"prompt": "a cat"})[0] == 200


def test_the_model_is_listed_with_what_a_client_needs_to_know(running):
    about = running.request("GET", "/v1/models")[1]["data"][0]
    assert (about["id"], about["object"], about["size"]) == ("tiny", "model", "16x16")
    assert about["limits"] == {"candidates": 8, "megabytes": 0.2, "timeout": 300.0}
    assert running.request("GET", "/health")[1]["status"] == "ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [("--timeout 0", "--timeout 0"), ("--queue 0", "--queue 0"), ("--port 99999", "--port 99999"), ("--port {taken}", "cannot listen")],
)
def test_options_that_cannot_work_are_named_before_the_model_is_opened(options, message):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=message):
            main(["--model", "no-model", *options.format(taken=other.getsockname()[1]).split()])
