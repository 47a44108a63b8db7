from __future__ import annotations

import shlex

import pytest

from ensemble_core.server_config import ServerConfig
from server.edge.serving import check_tls, curl_line, url


@pytest.mark.parametrize(
    ("host", "scheme", "expected"),
    [
        ("127.0.0.1", "http", "http://127.0.0.1:8000"),
        ("0.0.0.0", "https", "https://127.0.0.1:8000"),
        ("::", "http", "http://[::1]:8000"),
    ],
)
def test_where_a_client_on_this_machine_finds_the_server(host: str, scheme: str, expected: str) -> None:
    assert url(host, 8000, scheme) == expected


def test_the_line_to_try_takes_the_key_from_the_environment() -> None:
    assert "Authorization" not in curl_line("http://x", "duo")
    line = curl_line("http://x", "duo", keyed=True)
    assert '-H "Authorization: Bearer $UNISONO_API_KEY"' in line
    assert shlex.split(line)[1] == "http://x/v1/completions"


def test_without_tls_files_there_is_nothing_to_check() -> None:
    assert check_tls(ServerConfig()) is None
