"""The HTTP API works with OpenAI's unmodified client and returns OpenAI's errors; malformed ones are never a 500."""

import base64
import io
import json
import socket
import threading

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from paced_drawer import PacedDrawer
from PIL import Image
from schemathesis import GenerationMode
from small_mixture import PROMPTS, write_mixture
from small_server import ask, serving

from prunekit.serving.drawer import open_pipeline
from prunekit.serving.in_process import InProcessBackend
from prunekit.serving.limits import Limits, ServerSettings

LIMITS = Limits(letters=200, steps=20, images=3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return open_pipeline(write_mixture(tmp_path_factory.mktemp("mixture") / "run", 2), None, "cpu")


@pytest.fixture(scope="module")
def drawer(pipeline):
    return PacedDrawer(pipeline)


@pytest.fixture(scope="module")
def url(drawer):
    settings = ServerSettings(max_queued=6, limits=LIMITS)
    with serving(InProcessBackend([drawer], "small", 4, settings.max_queued), settings) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def image_of(data):
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def test_openais_client(client, pipeline):
    more = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 7}
    answer = client.images.generate(prompt=PROMPTS[0], model="small", n=2, size="32x64", user="me", extra_body=more)
    expected = pipeline(PROMPTS[0], None, 2, 3.0, 64, 32, 2, seeds=7, batch_size=2)
    assert answer.size == "32x64" and answer.output_format == "png" and answer.created > 1.7e9
    for row, data in enumerate(answer.data):
        assert image_of(data).tobytes() == expected.images[row].tobytes() and image_of(data).size == (32, 64)
        assert (data.seed, data.expert, data.macs) == (7 + row, expected.experts[row], expected.macs[row])
    again = client.images.generate(prompt=PROMPTS[0], n=2, size="32x64", response_format="b64_json", extra_body=more)
    assert [data.b64_json for data in again.data] == [data.b64_json for data in answer.data]
    assert [model.id for model in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"


@pytest.mark.parametrize(("kind", "opened"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, kind, opened):
    small = {"num_inference_steps": 1, "negative_prompt": ""}
    answer = client.images.generate(prompt="red apple", output_format=kind, output_compression=80, extra_body=small)
    assert image_of(answer.data[0]).format == opened and answer.output_format == kind
    assert 0 <= answer.data[0].seed < 2**32


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        (b"{", None, "the body is not JSON"),
        (b"[1]", None, "must be a JSON object"),
        (b'{"a":' * 3000, None, ""),
        (b'{"prompt": "\xff"}', None, ""),
        ({}, "prompt", "field 'prompt' is missing"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": " \n"}, "prompt", "say what the image shows"),
        ({"prompt": "x" * 201}, "prompt", "at most 200 characters"),
        (b'{"prompt": "\\ud800"}', "prompt", "unicode"),
        ({"prompt": "x", "promt": "y"}, "promt", "did you mean 'prompt'?"),
        ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": 4}, "n", "less than or equal to 3"),
        ({"prompt": "x", "n": "2"}, "n", "integer"),
        ({"prompt": "x", "n": True}, "n", "integer"),
        ({"prompt": "x", "size": "64"}, "size", "pattern"),
        ({"prompt": "x", "size": "63x64"}, "size", "multiples of 8, such as 64x64"),
        ({"prompt": "x", "size": "99999x99999"}, "size", "multiples"),
        ({"prompt": "x", "size": "80x64"}, "size", "at most 4,096 are allowed"),
        ({"prompt": "x", "num_inference_steps": 21}, "num_inference_steps", "less than or equal to 20"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "guidance_scale", "finite"),
        ({"prompt": "x", "guidance_scale": 1e9}, "guidance_scale", "less than"),
        ({"prompt": "x", "seed": -1}, "seed", "greater than"),
        ({"prompt": "x", "seed": 2**63 - 1, "n": 2}, "seed", "go beyond"),
        ({"prompt": "x", "seed": 2**70}, "seed", ""),
        ({"prompt": "x", "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"prompt": "x", "background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"prompt": "x", "stream": True}, "stream", "False"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_the_field(url, body, param, expected):
    status, content, _ = ask(url, body)
    error = content["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["param"] == param, content
    assert expected in error["message"] and "\n" not in error["message"] and len(error["message"]) < 300


def test_other_errors(url, drawer, caplog):
    status, content, _ = ask(url, {"prompt": "x", "model": "dall-e-3"})
    assert (
        status == 404 and content["error"]["code"] == "model_not_found" and "'small' is" in content["error"]["message"]
    )
    assert ask(url, path="/v1/models/other")[0] == 404 and ask(url, path="/nothing")[0] == 404
    status, content, headers = ask(url, path="/v1/images/generations")
    assert status == 405 and headers["Allow"] == "POST" and content["error"]["type"] == "invalid_request_error"
    assert ask(url, b"{}", **{"Content-Type": "text/plain"})[0] == 400
    status, content, _ = ask(url, {"prompt": "x" * LIMITS.body})
    assert status == 413 and "at most" in content["error"]["message"]
    drawer.faults = {"broken": RuntimeError("secret")}
    status, content, _ = ask(url, {"prompt": "broken"})
    drawer.faults = {}
    assert status == 500 and content["error"]["type"] == "server_error" and "secret" not in json.dumps(content)
    assert "secret" in caplog.text


def test_a_body_without_a_length_is_limited_too(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
        try:
            for _ in range(LIMITS.body // 4096 + 2):
                raw.sendall(chunk)
            raw.sendall(b"0\r\n\r\n")
        except ConnectionError:
            pass
        assert b" 413 " in raw.recv(100)


def test_health_and_metrics_say_what_is_under_way(url, drawer):
    before = samples(url)
    drawer.hold()
    first = threading.Thread(target=ask, args=(url, {"prompt": PROMPTS[0], "num_inference_steps": 2, "n": 2}))
    first.start()
    drawer.wait()
    status, content, _ = ask(url, path="/health")
    assert status == 200 and content["status"] == "ready" and content["waiting"] == 0
    assert content["running"][0]["images"] == 2 and content["running"][0]["step"] == 0
    drawer.go.set()
    first.join(60)
    after = samples(url)
    name = 'prunekit_requests_total{path="/v1/images/generations",status="200"}'
    assert after[name] - before.get(name, 0) == 1
    experts = [f'prunekit_expert_images_total{{expert="{expert}"}}' for expert in (0, 1)]
    assert sum(after[own] - before[own] for own in experts) == 2
    assert after["prunekit_macs_total"] > before["prunekit_macs_total"] and after["prunekit_ready"] == 1
    sizes = "prunekit_image_batch_size"
    assert (
        after[f"{sizes}_sum"] - before[f"{sizes}_sum"] == 4 and after[f"{sizes}_count"] - before[f"{sizes}_count"] == 2
    )
    assert after["process_resident_memory_bytes"] > 1e7
    status, content, _ = ask(url, path="/")
    assert status == 200 and content["model"] == "small" and "/metrics" in content["paths"]


def samples(url):
    """Return the counts of /metrics by name and labels."""
    lines = ask(url, path="/metrics")[1].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_a_full_queue_is_a_503_that_says_when_to_ask_again(url, drawer):
    drawer.hold()
    body = {"prompt": PROMPTS[0], "num_inference_steps": 1, "n": 3}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(url, body))) for _ in range(6)]
    for thread in threads:
        thread.start()
    drawer.wait()
    while len(answers) < 3:  # 3 or 4 images are in progress, and 6 may wait
        pass
    drawer.go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(status for status, *_ in answers) in ([200] * 3 + [503] * 3, [200] * 2 + [503] * 4)
    for status, content, headers in answers:
        assert status == 200 or (content["error"]["code"] == "overloaded" and int(headers["Retry-After"]) >= 1)


def test_a_client_that_leaves_stops_its_batch(url, drawer):
    before = samples(url)
    drawer.hold()
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPTS[0], "num_inference_steps": 20}).encode()
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        raw.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        drawer.wait()
    name = 'prunekit_requests_total{path="/v1/images/generations",status="499"}'
    while samples(url).get(name, 0) == before.get(name, 0):
        pass
    drawer.go.set()
    assert ask(url, {"prompt": PROMPTS[1], "num_inference_steps": 1})[0] == 200
    assert drawer.steps[0] == 1 and 20 not in drawer.steps


def test_a_request_that_takes_too_long_is_a_504(pipeline):
    drawer = PacedDrawer(pipeline)
    with serving(InProcessBackend([drawer], "small"), ServerSettings(request_seconds=0.3)) as url:
        drawer.hold()
        status, content, _ = ask(url, {"prompt": "red apple"})
        drawer.go.set()
    assert status == 504 and content["error"]["code"] == "timeout" and "0.3 s" in content["error"]["message"]
    assert len(drawer.steps) <= 1


def test_an_api_key(pipeline):
    with serving(InProcessBackend([PacedDrawer(pipeline)], "small"), ServerSettings(api_key="secret")) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, content, _ = ask(url, {"prompt": "x"}, **headers)
            assert status == 401 and content["error"]["code"] == "invalid_api_key"
            assert ask(url, path="/v1/models", **headers)[0] == 401
        assert ask(url, path="/v1/models", Authorization="Bearer secret")[0] == 200
        assert ask(url, path="/health")[0] in (200, 503) and ask(url, path="/metrics")[0] == 200


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.long)])
def test_malformed_requests_are_never_a_fault_of_the_server(url, count):
    """Bodies that violate the schema, generated as schemathesis does."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema["/v1/images/generations"]["POST"]
    seen = []

    @hypothesis.settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @hypothesis.given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case):
        answer = case.call()
        case.validate_response(answer)
        seen.append(answer.status_code)

    check()
    assert len(seen) >= count and set(seen) <= {400, 401, 404, 405, 413}
