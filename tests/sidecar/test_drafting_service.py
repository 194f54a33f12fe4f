"""DraftingService in a real sidecar: what a stream is told, what it may not be told, and who is disturbed by that."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import pytest
from sidecar_process import DEADLINE, SidecarProcess, StepClient, eventually, regex
from sidecar_process import Row as MaskRow

from quire.v1 import drafting_pb2, drafting_pb2_grpc

TEXT = [11, 12, 13, 14, 15, 16, 17, 18]


class DraftClient:
    """One Draft stream, one request at a time."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._outgoing: queue.SimpleQueue[drafting_pb2.DraftRequest | None] = queue.SimpleQueue()
        stub = drafting_pb2_grpc.DraftingServiceStub(self._channel)
        self._call = stub.Draft(iter(self._outgoing.get, None), wait_for_ready=True, timeout=DEADLINE)
        self._step = 0

    def ask(self, *rows: drafting_pb2.DraftRow, released: Sequence[int] = ()) -> Mapping[int, list[int]]:
        self._step += 1
        self._outgoing.put(drafting_pb2.DraftRequest(step=self._step, rows=rows, released=released))
        response = next(self._call)
        assert response.step == self._step
        return {draft.sequence: list(draft.token_ids) for draft in response.drafts}

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()


def first(sequence: int, token_ids: Sequence[int], num_prompt_tokens: int, salt: str = "") -> drafting_pb2.DraftRow:
    start = drafting_pb2.SequenceStart(num_prompt_tokens=num_prompt_tokens, cache_salt=salt)
    return drafting_pb2.DraftRow(sequence=sequence, start=start, token_ids=token_ids, num_tokens=4)


def more(sequence: int, token_ids: Sequence[int] = (), num_tokens: int = 4) -> drafting_pb2.DraftRow:
    return drafting_pb2.DraftRow(sequence=sequence, token_ids=token_ids, num_tokens=num_tokens)


@pytest.fixture
def drafts(sidecar: SidecarProcess) -> Iterator[DraftClient]:
    client = DraftClient(sidecar.address)
    yield client
    client.close()


def test_a_sequence_is_told_bit_by_bit(drafts: DraftClient) -> None:
    """Drafts would follow a text that is not the sequence's."""
    assert drafts.ask(first(1, TEXT, 8), first(2, [1, 2], 2)) == {}
    assert drafts.ask(more(1, TEXT[:2])) == {}
    assert drafts.ask(more(2, [3]), more(1, TEXT[2:4])) == {1: TEXT[4:8]}
    assert drafts.ask(more(1, TEXT[4:5], num_tokens=2)) == {1: TEXT[5:7]}
    # Told anew, as after its engine's doubts, it is another text.
    assert drafts.ask(first(1, [1, *TEXT[:5]], 1)) == {}


def test_an_ended_output_is_for_its_tenant_and_its_stream_only(sidecar: SidecarProcess, drafts: DraftClient) -> None:
    """A tenant's text in another's drafts could be told from how fast its answers come."""
    drafts.ask(first(1, [7, *TEXT], 1, "a"))
    drafts.ask(released=[1])

    def proposed(salt: str) -> list[int]:
        return drafts.ask(first(2, [9, *TEXT[:4]], 1, salt)).get(2, [])

    eventually(lambda: proposed("a") == TEXT[4:8])
    assert proposed("b") == []
    other = DraftClient(sidecar.address)
    assert other.ask(first(2, [9, *TEXT[:4]], 1, "a")) == {}
    other.close()


def test_a_long_prompt_is_read_while_others_are_answered(drafts: DraftClient) -> None:
    """Everybody's masks and drafts would be late by as long as it takes to read."""
    prompt = [(index * index) % 30_011 for index in range(30_000)]
    assert drafts.ask(first(1, [*prompt, *TEXT, *TEXT[:3]], 30_008), first(2, [*TEXT, *TEXT[:3]], 8)) == {2: TEXT[3:6]}
    eventually(lambda: drafts.ask(more(1)) == {1: TEXT[3:6]})


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([more(5, TEXT)], "rows.sequence 5 is unknown on this stream: its first row must have start"),
        ([more(1, [2**31])], "rows.token_ids holds 2147483648: it must lie in [0, 2147483647]"),
        ([more(1, num_tokens=65)], "rows.num_tokens is 65: it must lie in [0, 64]"),
        ([more(1), more(1)], "a rows.sequence stands twice"),
        ([first(index, [], 0) for index in range(4097)], "rows has 4097 entries: at most 4096"),
    ],
)
def test_a_broken_request_ends_its_stream_alone(
    sidecar: SidecarProcess,
    stream: StepClient,
    drafts: DraftClient,
    rows: Sequence[drafting_pb2.DraftRow],
    words: str,
) -> None:
    """One engine's bug would take the masks and drafts of all others away."""
    other = DraftClient(sidecar.address)
    for client in (drafts, other):
        client.ask(first(1, TEXT, 8))
    with pytest.raises(grpc.RpcError) as caught:
        drafts.ask(*rows)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()
    assert other.ask(more(1, TEXT[:3])) == {1: TEXT[3:6]}
    other.close()
    assert stream.fill(MaskRow(1, regex("[0-9]"))) == {}


def test_what_has_no_room_is_left_out(tmp_path: Path) -> None:
    """The sidecar would grow until the pod is killed; or one long request would push all others out."""
    with SidecarProcess(tmp_path, "--drafting-total-tokens", "64") as small:
        client = DraftClient(small.address)
        assert client.ask(first(1, [*TEXT, *TEXT[:3]], 8), first(2, range(60), 1)) == {1: TEXT[3:6]}
        assert client.ask(more(1, TEXT[3:4]), more(2, [0, 1, 2])) == {1: TEXT[4:8]}
        # Those that ended make room.
        assert client.ask(first(3, [*range(40), 0, 1, 2], 40), released=[1, 2]) == {3: [3, 4, 5]}
        client.close()
