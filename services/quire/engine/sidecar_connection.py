"""A thread that keeps a stream to one of the sidecar's services open, for as long as the core lives.

Who uses this: `sidecar_masks` and `sidecar_drafts`. Both survive that the sidecar is started again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.service.errors import QuireError
from quire.service.grpc_server import CHANNEL_OPTIONS

# The sidecar is on this machine: look for it often. One that refuses the stream will do so again.
_CHANNEL_OPTIONS = [*({**dict(CHANNEL_OPTIONS), "grpc.max_reconnect_backoff_ms": 500}).items()]
RETRY_S = 0.05
RETRY_REFUSED_S = 1.0


class SidecarConnection:
    """Calls `talk(channel)` when the sidecar serves `service`, and again after it has ended or failed.

    `talk` opens a stream, hands it to `hold` and hears it until it ends. `lost` is called with what ended it and says
    how many seconds to wait. `close` cancels the stream that is held, which ends the thread.
    """

    def __init__(
        self,
        address: str,
        service: str,
        name: str,
        talk: Callable[[grpc.Channel], None],
        lost: Callable[[Exception], float],
    ) -> None:
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._service = service
        self._talk = talk
        self._lost = lost
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._cancel: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins to look for the sidecar."""
        self._thread.start()

    def hold(self, cancel: Callable[[], object]) -> None:
        """`cancel` ends what is being waited for."""
        with self._lock:
            self._cancel = cancel
            closed = self._closed.is_set()
        if closed:
            cancel()

    def close(self) -> None:
        """Ends the stream, which frees the sidecar's side too; nothing is called any more when this returns."""
        with self._lock:
            self._closed.set()
            cancel = self._cancel
        cancel()
        self._thread.join()
        self._channel.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            retry = RETRY_S
            try:
                self._wait_for_sidecar()
                self._talk(self._channel)
            except grpc.FutureCancelledError:
                return
            except (grpc.RpcError, OSError, QuireError) as error:
                if self._closed.is_set():
                    return
                retry = self._lost(error)
            self._closed.wait(retry)

    def _wait_for_sidecar(self) -> None:
        """Blocks until the sidecar is reached, so that nothing is made for one that is not there."""
        request = health_pb2.HealthCheckRequest(service=self._service)
        answer = health_pb2_grpc.HealthStub(self._channel).Check.future(request, wait_for_ready=True)
        self.hold(answer.cancel)
        answer.result()
