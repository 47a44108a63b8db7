"""/v1/files and /v1/batches through OpenAI's own SDK, over a real server with a scripted runtime."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_runtime import FakeRuntime, live_server
from starlette.testclient import TestClient

from ensemble_core.errors import ConfigError
from ensemble_core.limits import LimitsConfig
from ensemble_core.server_config import ServerConfig
from server.batches import records
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

TEXT = " Hello wörld 😀!"
URL = "/v1/completions"


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


def config(folder: Path, **own: Any) -> ServerConfig:
    limits = {"files": 8, "file_bytes": 200_000, "batch_lines": 500} | own.pop("limits", {})
    return ServerConfig(files_folder=folder, limits=LimitsConfig(**limits), drain_seconds=0.2, **own)


@pytest.fixture
def base(runtime: FakeRuntime, folder: Path) -> Iterator[str]:
    with live_server(runtime, config(folder)) as base:
        yield base


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        yield client


def lines(num: int, **body: Any) -> bytes:
    made = [
        {
            "custom_id": f"c{rank}",
            "method": "POST",
            "url": URL,
            "body": {"model": "duo", "prompt": f"p{rank}", **body},
        }
        for rank in range(num)
    ]
    return "".join(json.dumps(each) + "\n" for each in made).encode()


def upload(client: openai.OpenAI, content: bytes, name: str = "in.jsonl") -> Any:
    return client.files.create(file=(name, io.BytesIO(content)), purpose="batch")


def begun(client: openai.OpenAI, content: bytes, **own: Any) -> Any:
    file = upload(client, content)
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", **own)


def ended(client: openai.OpenAI, batch: Any, seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while batch.status not in records.ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = client.files.content(file_id).text
    return {each["custom_id"]: each for each in map(json.loads, text.splitlines())}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nobody_waits_for_a_batch_and_the_engine_hears_of_it(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    client.completions.create(model="duo", prompt="mine")
    ended(client, begun(client, lines(2)))
    assert {request.prompt: request.batch for request in runtime.seen} == {"mine": False, "p0": True, "p1": True}


def test_files(client: openai.OpenAI) -> None:
    first, second = upload(client, b"one\n", "a.jsonl"), upload(client, b"two\n", "../../b\x01.jsonl")
    assert (first.bytes, first.filename, first.purpose, first.object) == (4, "a.jsonl", "batch", "file")
    assert client.files.retrieve(first.id) == first
    assert client.files.content(second.id).content == b"two\n"
    assert [file.id for file in client.files.list()] == [second.id, first.id]
    assert [file.id for file in client.files.list(order="asc", limit=1)] == [first.id, second.id]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == []
    assert client.files.delete(first.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    assert [file.id for file in client.files.list()] == [second.id]


def test_a_batch_from_its_file_to_its_answers(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    content = lines(30) + lines(1, temperature=9).replace(b'"c0"', b'"hot"')
    batch = begun(client, content, metadata={"job": "seven"})
    assert (batch.status, batch.metadata, batch.object) == ("validating", {"job": "seven"}, "batch")
    batch = ended(client, batch)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (31, 30, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    answers = results(client, batch.output_file_id)
    assert answers.keys() == {f"c{rank}" for rank in range(30)}
    assert all(each["response"]["body"]["choices"][0]["text"] == TEXT for each in answers.values())
    assert results(client, batch.error_file_id)["hot"]["response"]["status_code"] == 400
    assert {request.prompt for request in runtime.seen} == {f"p{rank}" for rank in range(30)}
    assert [each.id for each in client.batches.list()] == [batch.id]
    output = client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def test_a_wrong_line_fails_the_batch_before_it_begins(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    other = lines(1).replace(b'"c0"', b'"x"').replace(URL.encode(), b"/v1/chat/completions")
    batch = ended(client, begun(client, lines(2) + b"{bad\n" + lines(1) + other + lines(1, stream=True)))
    assert batch.status == "failed"
    found = [(each.code, each.line) for each in batch.errors.data]
    codes = ["invalid_json", "duplicate_custom_id", "invalid_url", "duplicate_custom_id"]
    assert found == list(zip(codes, (3, 4, 5, 6), strict=True))
    assert batch.output_file_id is None
    assert runtime.seen == []


@pytest.mark.parametrize(("content", "code"), [(b"\n", "empty_file"), (lines(501), "too_many_requests")])
def test_a_batch_of_too_few_or_too_many_lines_fails(client: openai.OpenAI, content: bytes, code: str) -> None:
    batch = ended(client, begun(client, content))
    assert (batch.status, [each.code for each in batch.errors.data]) == ("failed", [code])


def test_what_is_refused_is_refused_by_name(client: openai.OpenAI, base: str) -> None:
    file = upload(client, lines(1))
    make: Any = client.batches.create
    for fields, param in (
        ({"input_file_id": file.id, "endpoint": "/v1/models"}, "endpoint"),
        ({"input_file_id": file.id, "endpoint": "/v1/batches"}, "endpoint"),
        ({"input_file_id": file.id, "endpoint": URL, "completion_window": "1h"}, "completion_window"),
        ({"input_file_id": file.id, "endpoint": URL, "metadata": {"a": "x" * 600}}, "metadata.a"),
        (
            {
                "input_file_id": file.id,
                "endpoint": URL,
                "output_expires_after": {"anchor": "created_at", "seconds": 9},
            },
            "output_expires_after",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            make(**{"completion_window": "24h"} | fields)
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        make(input_file_id="file-nope", endpoint=URL, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.cancel("batch-nope")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a", b"x"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(
            file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    for content, headers, status in (
        (b"{}", {"content-type": "application/json"}, 415),
        (b"junk", {"content-type": "multipart/form-data; boundary=x"}, 400),
        (b"junk", {"content-type": "multipart/form-data"}, 400),
    ):
        answer = httpx.post(f"{base}/v1/files", content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    answer = httpx.post(f"{base}/v1/files", data={"purpose": "batch", "file": "no file"})
    assert answer.status_code in (400, 415)


def test_an_upload_is_bounded_before_it_is_read(runtime: FakeRuntime, folder: Path) -> None:
    app = create_app(runtime, config(folder), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost") as client:
        form: Any = {"files": {"file": ("a", b"x" * 300_000)}, "data": {"purpose": "batch"}}
        answer = client.post("/v1/files", **form)
        assert answer.status_code == 413
        assert "file_bytes" in answer.json()["error"]["message"]
        answer = client.post("/v1/files", content=iter([b"x" * 100_000] * 3), headers={"content-type": "a/b"})
        assert answer.status_code == 415


def test_files_are_bounded_in_size_and_count(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="file_bytes"):
        upload(client, b"x" * 200_001)  # the body alone may be so long
    for _ in range(8):
        last = upload(client, b"x" * 200_000)
    with pytest.raises(openai.BadRequestError, match=r"server\.limits\.files"):
        upload(client, b"x")
    client.files.delete(last.id)
    assert upload(client, b"x").bytes == 1


def test_other_bodies_keep_their_own_bound(client: openai.OpenAI, base: str) -> None:
    answer = httpx.post(f"{base}{URL}", json={"model": "duo", "prompt": "x" * 5_000_000})
    assert answer.status_code == 413
    assert "max_body_bytes" in answer.text


def test_a_cancelled_batch_keeps_what_is_answered(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.delay = 0.02
    batch = begun(client, lines(300))
    wait_for(lambda: len(runtime.seen) > 25)
    with pytest.raises(openai.BadRequestError, match="reads this file"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    answers = results(client, batch.output_file_id)
    assert 0 < len(answers) == batch.request_counts.completed == len(runtime.seen) < 300
    assert runtime.aborted == []
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        client.batches.cancel(batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_one_clients_batches_take_turns_and_one_that_waits_can_be_cancelled(
    client: openai.OpenAI, runtime: FakeRuntime
) -> None:
    runtime.endless, runtime.delay = True, 0.01
    first, second = begun(client, lines(2)), begun(client, lines(2))
    wait_for(lambda: runtime.num_open == 2)
    assert client.batches.retrieve(second.id).status == "validating"
    client.batches.cancel(second.id)
    assert ended(client, second).status == "cancelled"
    assert client.batches.retrieve(first.id).status == "in_progress"


def test_an_expired_batch_names_what_it_did_not_answer(
    client: openai.OpenAI, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "WINDOW_SECONDS", 3)
    runtime.delay = 0.1
    batch = ended(client, begun(client, lines(300)))
    assert batch.status == "expired"
    answers, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert answers.keys() | errors.keys() == {f"c{rank}" for rank in range(300)}
    assert len(answers) + len(errors) == 300
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(answers), len(errors))


def test_a_batch_leaves_places_to_those_who_wait(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    """With half of 32 places, at most 16 requests of batches run; with 16 others open, none begins."""
    runtime.endless, runtime.delay = True, 0.01
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, runtime.num_open)
        return len(runtime.seen) >= 16

    batch = begun(client, lines(40))
    wait_for(look)
    time.sleep(0.3)
    look()
    assert most == 16
    client.batches.cancel(batch.id)
    runtime.endless = False
    assert ended(client, batch).status == "cancelled"

    runtime.num_open += 16  # others
    before = len(runtime.seen)
    batch = begun(client, lines(3))
    time.sleep(0.3)
    assert len(runtime.seen) == before
    runtime.num_open -= 16
    assert ended(client, batch).status == "completed"


def test_each_key_sees_its_own(runtime: FakeRuntime, folder: Path) -> None:
    with live_server(runtime, config(folder, api_keys=["one", "two"])) as base:

        def as_client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)

        with as_client("one") as one, as_client("two") as two, as_client("three") as three:
            batch = ended(one, begun(one, lines(3)))
            assert batch.status == "completed"
            assert {request.owner[0] for request in runtime.seen} != {""}
            assert list(two.files.list()) == []
            assert list(two.batches.list()) == []
            for call in (
                lambda: two.files.content(batch.output_file_id),
                lambda: two.files.delete(batch.input_file_id),
                lambda: two.batches.retrieve(batch.id),
                lambda: two.batches.cancel(batch.id),
                lambda: two.batches.create(
                    input_file_id=batch.input_file_id, endpoint=URL, completion_window="24h"
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    call()
            with pytest.raises(openai.AuthenticationError):
                upload(three, b"x")
    told = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b'"one"' not in told


def test_a_server_that_starts_again_goes_on(folder: Path) -> None:
    first, second = FakeRuntime(delay=0.02), FakeRuntime()
    with live_server(first, config(folder)) as base, openai.OpenAI(base_url=f"{base}/v1", api_key="x") as client:
        batch = begun(client, lines(300))
        waiting = begun(client, lines(2))
        wait_for(lambda: len(first.seen) > 40)
    (output,) = folder.glob("*.output")
    done = {json.loads(line)["custom_id"] for line in output.read_bytes().splitlines()}
    assert 0 < len(done) < 300
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom')  # as if it had been killed in a write
    (folder / "file-x.part").write_bytes(b"half an upload")
    with live_server(second, config(folder)) as base, openai.OpenAI(base_url=f"{base}/v1", api_key="x") as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        assert batch.status == "completed"
        assert results(client, batch.output_file_id).keys() == {f"c{rank}" for rank in range(300)}
        assert batch.request_counts.completed == 300
        assert ended(client, client.batches.retrieve(waiting.id)).status == "completed"
    assert len(second.seen) == 300 - len(done) + 2
    assert not list(folder.glob("*.part"))
    assert not list(folder.glob("*.output"))


def test_a_full_disk_fails_the_batch_by_name(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, result: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.batches.results.ResultFile.write", full)
    batch = ended(client, begun(client, lines(3)))
    assert batch.status == "failed"
    assert "No space left" in batch.errors.data[0].message


def test_without_a_folder_there_are_no_such_routes(runtime: FakeRuntime) -> None:
    app = create_app(runtime, ServerConfig(), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost") as client:
        for path in ("/v1/files", "/v1/batches"):
            assert client.get(path).status_code == 404
        assert "/v1/files" not in client.get("/openapi.json").json()["paths"]


def test_a_web_page_cannot_upload_to_a_server_without_keys(runtime: FakeRuntime, folder: Path) -> None:
    app = create_app(runtime, config(folder, cors_origins=["https://a.example"]), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost") as client:
        for origin, status in (("https://evil.example", 403), ("null", 403), ("https://a.example", 200)):
            form: Any = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
            assert client.post("/v1/files", headers={"Origin": origin}, **form).status_code == status


def test_a_damaged_folder_is_named(runtime: FakeRuntime, folder: Path) -> None:
    for name in ("file-x.json", "batch-x.json"):
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text('{"id": 1}')
        with pytest.raises(ConfigError, match=f"{name} is damaged"):
            create_app(runtime, config(folder), PrometheusMetrics())  # type: ignore[arg-type]
        path.unlink()
    (folder.parent / "plain").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        create_app(runtime, config(folder.parent / "plain"), PrometheusMetrics())  # type: ignore[arg-type]
