"""The core's end of its socket to the server."""

from __future__ import annotations

import socket

import pytest

from quire.engine.core_process import ServerGoneError, ServerLink
from quire.engine.messages import Loading


@pytest.mark.parametrize("unread", [False, True])
def test_a_killed_server_is_noticed_whatever_it_left_unread(unread: bool) -> None:
    """With messages unread its end is a reset, which must end the core in order, too, not as a step that failed."""
    ours, theirs = socket.socketpair()
    with ours:
        link = ServerLink(ours)
        if unread:
            link.send(Loading("weights", 0.5))
        theirs.close()
        with pytest.raises(ServerGoneError):
            link.receive(block=True)
