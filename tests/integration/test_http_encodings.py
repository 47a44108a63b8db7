"""Compressed bodies through the whole app: read within the limits, and refused where they are not what they say."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
from fake_runtime import FakeRuntime, live_server
from starlette.testclient import TestClient

from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.encodings import Inflater
from server.edge.errors import RefusedBodyError
from server.edge.metrics import PrometheusMetrics

BODY = json.dumps({"model": "duo", "prompt": "a b c"}).encode()
LIMIT = 4096


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = create_app(FakeRuntime(), ServerConfig(max_body_bytes=LIMIT), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost", headers={"Content-Type": "application/json"}) as client:
        yield client


PACKED = {
    "gzip": gzip.compress(BODY),
    "GZip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    " deflate ": raw_deflate(BODY),
    "identity": BODY,
    "": BODY,
}


@pytest.mark.parametrize("encoding", PACKED)
def test_a_compressed_body_is_read_as_the_plain_one(client: TestClient, encoding: str) -> None:
    answer = client.post("/v1/completions", content=PACKED[encoding], headers={"Content-Encoding": encoding})
    assert answer.json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "deflate, gzip", "nonsense"])
def test_other_encodings_are_refused(client: TestClient, encoding: str) -> None:
    answer = client.post("/v1/completions", content=BODY, headers={"Content-Encoding": encoding})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert "Content-Encoding" in answer.json()["error"]["message"]


DAMAGED = {
    "gzip, not packed": BODY,
    "gzip, cut": gzip.compress(BODY)[:-4],
    "gzip, more behind": gzip.compress(BODY) + b"x",
    "gzip, twice": gzip.compress(BODY) * 2,
    "gzip, empty": b"",
    "deflate, not packed": b"x",
    "deflate, cut": zlib.compress(BODY)[:-1],
    "deflate, more behind": raw_deflate(BODY) + b"x",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_not_so_encoded_is_refused(client: TestClient, damage: str) -> None:
    encoding, content = damage.split(",")[0], DAMAGED[damage]
    answer = client.post("/v1/completions", content=content, headers={"Content-Encoding": encoding})
    assert answer.status_code == 400
    assert encoding in answer.json()["error"]["message"]


def test_the_limit_is_that_of_the_inflated_body(client: TestClient) -> None:
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        body = BODY + b" " * (size - len(BODY))
        answer = client.post("/v1/completions", content=gzip.compress(body), headers={"Content-Encoding": "gzip"})
        assert answer.status_code == status


def test_a_bomb_is_not_inflated() -> None:
    """A hundred megabytes in a hundred kilobytes: refused within the memory of the limit."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(100)) + packer.flush()
    assert len(bomb) < 200_000

    def check(size: int) -> None:
        if size > LIMIT:
            raise RefusedBodyError(413, "too large")

    tracemalloc.start()
    with pytest.raises(RefusedBodyError, match="too large"):
        Inflater("gzip", LIMIT, check).feed(bomb, last=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_compressed_body_in_pieces_over_a_socket() -> None:
    import httpx

    def pieces() -> Iterator[bytes]:
        for byte in gzip.compress(BODY):
            yield bytes([byte])

    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with live_server(FakeRuntime()) as base:
        answer = httpx.post(f"{base}/v1/completions", content=pieces(), headers=headers)
        assert answer.json()["usage"]["prompt_tokens"] == 3
        bomb = gzip.compress(bytes(64 * 2**20))
        assert httpx.post(f"{base}/v1/completions", content=bomb, headers=headers).status_code == 413
        assert httpx.head(f"{base}/health").status_code == 200
