"""A browser on the server's page."""

import pytest

from tests.long.server import Server


def test_the_servers_page_can_chat(demo: Server) -> None:
    status, raw = demo.get("/")
    assert status == 200
    if b"<html" not in raw.lower():
        pytest.skip("no page is served yet")
    pytest.fail("a page is served: drive it here by a browser")
