"""GrammarService.Step: sequences on a stream, their errors, and what is left when the stream ends."""

from __future__ import annotations

import itertools
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import free_port
from sidecar_process import DEADLINE, Row, SidecarProcess, StepClient, eventually, json_schema, lark, regex

from quire.service.checkpoint import TextModel
from quire.service.errors import ErrorCode
from quire.v1 import grammar_pb2, grammar_pb2_grpc

PERSON = json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
DIGITS = regex("[0-9]{3}")


def test_each_row_has_its_own_grammar_and_state(stream: StepClient, smollm: TextModel) -> None:
    """Sequences of a batch would be masked with each other's grammars."""
    person = smollm.tokenizer.encode('{"name": "').ids
    assert not stream.fill(Row(7, PERSON, person), Row(8, DIGITS), Row(9, DIGITS, smollm.tokenizer.encode("123").ids))
    letters, digits = (smollm.tokenizer.token_to_id(token) for token in ("A", "4"))
    assert {letters, digits} <= set(stream.allowed(0))
    assert digits in stream.allowed(1)
    assert letters not in stream.allowed(1)
    assert list(stream.allowed(2)) == list(smollm.eos_token_ids)
    # Rows follow the request, not the sequence.
    assert not stream.fill(Row(8), Row(7))
    assert letters not in stream.allowed(0)
    assert letters in stream.allowed(1)


_OUTPUT = '{"name": "Zoë 東京", "tags": [1, {"x": null}]}'


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_replay_equals_going_step_by_step(shared_stream: StepClient, smollm: TextModel, cuts: list[int]) -> None:
    """After a restart, masks would differ from those before it."""
    ids = smollm.tokenizer.encode(_OUTPUT).ids
    edges = sorted({0, *(min(cut, len(ids)) for cut in cuts)})
    sequence = 1 << 40
    assert not shared_stream.fill(Row(sequence, PERSON))
    for start, end in itertools.pairwise(edges):
        assert not shared_stream.fill(
            Row(sequence, accepted=ids[start:end]), Row(sequence + 1 + end, PERSON, ids[:end])
        )
        assert np.array_equal(shared_stream.masks[0], shared_stream.masks[1])
    shared_stream.fill(released=[sequence, *(sequence + 1 + end for end in edges)])


def test_one_rows_error_leaves_the_others_alone(stream: StepClient, smollm: TextModel) -> None:
    """One bad request would end its whole batch."""
    assert not stream.fill(Row(1, DIGITS), Row(2, DIGITS))
    letter, digit = (smollm.tokenizer.encode(text).ids for text in ("x", "5"))
    errors = stream.fill(
        Row(1, accepted=letter),
        Row(2, accepted=digit),
        Row(3),
        Row(4, regex("[z-a]")),
    )
    assert {sequence: error.code for sequence, error in errors.items()} == {
        1: ErrorCode.INTERNAL,
        3: ErrorCode.INTERNAL,
        4: ErrorCode.INVALID_ARGUMENT,
    }
    assert "left its constraint" in errors[1].message
    assert "sequence 3 is unknown" in errors[3].message
    assert errors[4].field == "constraint.regex"
    assert smollm.tokenizer.token_to_id("5") in stream.allowed(1)
    # What failed is gone; its name may be used again.
    assert not stream.fill(Row(1, DIGITS), Row(2, accepted=digit))
    assert smollm.tokenizer.token_to_id("5") in stream.allowed(0)
    assert list(stream.fill(Row(3))) == [3]


def test_a_grammar_that_becomes_too_ambiguous_ends_with_its_field(stream: StepClient, smollm: TextModel) -> None:
    """A grammar that is cheap to compile would stall its batch at some later token."""
    ids = smollm.tokenizer.encode("a" * 400).ids
    errors = stream.fill(Row(1, DIGITS), Row(2, regex("((a{1,50}){1,50}){1,50}"), ids))
    assert errors[2].code is ErrorCode.INVALID_ARGUMENT
    assert errors[2].field == "constraint.regex"
    assert list(errors) == [2]


def test_a_bomb_in_a_first_row_costs_only_its_sequence(stream: StepClient) -> None:
    """A constraint that nobody compiled before would hold up its batch for ever."""
    errors = stream.fill(Row(1, DIGITS), Row(2, json_schema({"type": "integer", "multipleOf": 999_983})))
    assert list(errors) == [2]
    assert "it takes longer than 2 s" in errors[2].message
    assert len(stream.allowed(0))


def test_all_grammars_of_an_engine_at_once(stream: StepClient, smollm: TextModel, tmp_path: Path) -> None:
    """After a restart, requests that are half done would be told to come back because there are many of them."""
    with SidecarProcess(tmp_path, "--compile-workers", "1", "--compile-seconds", "1") as sidecar:
        many = StepClient(sidecar.address, tmp_path, smollm.vocab_size, rows=60)
        slow = [json_schema({"type": "integer", "multipleOf": 99_000 + number}) for number in (1, 3)]
        grammars = [regex(f"[0-9]{{{number}}}") for number in range(1, 55)]
        errors = many.fill(*(Row(number, grammar) for number, grammar in enumerate([*slow, *grammars])))
        # The first two take all the time that they may, and nobody behind them ends with them.
        assert not {number for number in errors if number >= len(slow)}
        assert all(error.code is ErrorCode.INVALID_ARGUMENT for error in errors.values())
        many.close()


def test_released_sequences_are_forgotten(stream: StepClient) -> None:
    """States of ended requests would pile up as long as the engine lives."""
    assert not stream.fill(Row(1, DIGITS), Row(2, DIGITS))
    assert not stream.fill(Row(2), released=[1, 99])
    assert list(stream.fill(Row(1), Row(2))) == [1]


def test_rows_that_go_on_by_a_token(stream: StepClient, smollm: TextModel) -> None:
    """Columns that are taken for other sequences, rows or tokens than they name would mix up masks."""
    one, two = (smollm.tokenizer.token_to_id(digit) for digit in "12")
    assert not stream.fill(Row(1, regex("12a")), Row(2, regex("21b")), Row(3, regex("1c")))
    columns = grammar_pb2.NextMasks(sequences=[2, 1], rows=[0, 2], accepted=[two, one])
    rows = [{"sequence": 3, "row": 1, "accepted": [one]}]
    fill = grammar_pb2.FillMasks(step=9, rows=rows, next=columns)
    assert not stream.ask(grammar_pb2.StepRequest(fill=fill)).filled.errors
    found = [{smollm.tokenizer.id_to_token(token) for token in stream.allowed(row)} for row in range(3)]
    assert [{"1", "c", "2"} & tokens for tokens in found] == [{"1"}, {"c"}, {"2"}]
    unknown = grammar_pb2.NextMasks(sequences=[7], rows=[0], accepted=[one])
    answer = stream.ask(grammar_pb2.StepRequest(fill=grammar_pb2.FillMasks(step=10, next=unknown)))
    assert [error.sequence for error in answer.filled.errors] == [7]


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (grammar_pb2.FillMasks(rows=[{"sequence": 1, "row": 4}]), "rows reach to row 4 and the file has 4 rows"),
        (
            grammar_pb2.FillMasks(rows=[{"sequence": 1, "row": 2, "drafts": [5, 6]}]),
            "rows reach to row 4 and the file has 4 rows",
        ),
        (
            grammar_pb2.FillMasks(rows=[{"sequence": 1, "row": 1}, {"sequence": 2, "row": 0, "drafts": [5]}]),
            "rows.row is 1, which another sequence",
        ),
        (
            grammar_pb2.FillMasks(rows=[{"sequence": 1, "row": 0}, {"sequence": 2, "row": 0}]),
            "rows.row is 0, which another sequence",
        ),
        (
            grammar_pb2.FillMasks(rows=[{"sequence": 1, "row": 0}, {"sequence": 1, "row": 1}]),
            "rows.sequence stands twice",
        ),
        (grammar_pb2.FillMasks(rows=[{"sequence": 1, "row": 0, "constraint": {}}]), "constraint has no kind"),
        (
            grammar_pb2.FillMasks(next={"sequences": [1, 2], "rows": [0, 1], "accepted": [5]}),
            "next has 2 sequences, 2 rows and 1 accepted",
        ),
        (
            grammar_pb2.FillMasks(
                rows=[{"sequence": 1, "row": 0, "drafts": [5]}],
                next={"sequences": [2], "rows": [1], "accepted": [5]},
            ),
            "rows.row is 1, which another sequence",
        ),
    ],
)
def test_a_request_that_breaks_the_contract_ends_the_stream(
    stream: StepClient, fill: grammar_pb2.FillMasks, words: str
) -> None:
    """A peer's mistake would write outside the file, or be taken for something else."""
    with pytest.raises(grpc.RpcError, match=words) as caught:
        stream.ask(grammar_pb2.StepRequest(fill=fill))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_streams_open_with_a_file_of_the_right_size(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> None:
    """A wrong path or another model would corrupt a file, or masks, silently."""
    size, words = smollm.vocab_size, smollm.vocab_size // 32
    (tmp_path / "small").write_bytes(bytes(100))
    (tmp_path / "right").write_bytes(bytes(words * 4))
    (tmp_path / "link").symlink_to(tmp_path / "right")

    def opening(path: str, rows: int = 1, vocab_size: int = size) -> grammar_pb2.StepRequest:
        return grammar_pb2.StepRequest(
            open=grammar_pb2.OpenMasks(path=str(tmp_path / path), rows=rows, vocab_size=vocab_size)
        )

    cases = [
        (opening("missing"), "can't be opened (No such file or directory)"),
        (opening("link"), "can't be opened"),
        (opening("small"), "has 100 bytes: 1 rows of 1536 words need 6144"),
        (opening("right", rows=0), "need 0"),
        (opening("right", vocab_size=size + 32), "start both with the same --model"),
        (grammar_pb2.StepRequest(fill=grammar_pb2.FillMasks(step=1)), "first request must be open"),
    ]
    with sidecar.channel as channel:
        stub = grammar_pb2_grpc.GrammarServiceStub(channel)
        for request, words_of_error in cases:
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.Step(iter([request]), timeout=DEADLINE))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert words_of_error in (caught.value.details() or "")
        assert next(stub.Step(iter([opening("right")]), timeout=DEADLINE)).HasField("opened")


def test_opening_twice_ends_the_stream(stream: StepClient) -> None:
    """A second file would leave the first one's rows unfilled."""
    with pytest.raises(grpc.RpcError, match="every request after the first must be fill"):
        stream.ask(grammar_pb2.StepRequest(open=grammar_pb2.OpenMasks(path="x", rows=1, vocab_size=1)))


@pytest.fixture
def metered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SidecarProcess, int]]:
    port = free_port()
    with SidecarProcess(tmp_path_factory.mktemp("metered"), "--metrics-port", str(port)) as process:
        process.wait_until_serving()
        yield process, port


def read_metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_a_closed_stream_frees_all_it_held(
    metered: tuple[SidecarProcess, int], smollm: TextModel, tmp_path: Path
) -> None:
    """Every restart of an engine would leave its sequences and its memory in the sidecar; metrics would not tell."""
    sidecar, port = metered
    stream = StepClient(sidecar.address, tmp_path, smollm.vocab_size)
    assert not stream.fill(Row(1, DIGITS), Row(2, lark('start: "a"')))
    assert list(stream.fill(Row(1), Row(3))) == [3]
    assert sidecar.maps(str(stream.path))
    metrics = read_metrics(port)
    assert metrics["quire_sidecar_streams"] == 1
    assert metrics["quire_sidecar_sequences"] == 2
    assert metrics['quire_sidecar_compiles_total{kind="regex",result="compiled"}'] == 1
    assert metrics["quire_sidecar_row_errors_total"] == 1
    assert metrics["quire_sidecar_fill_seconds_count"] == 2
    assert metrics["quire_sidecar_compile_seconds_count"] == 2
    assert metrics["quire_sidecar_slowest_row_seconds_count"] == 2
    assert metrics["quire_sidecar_late_rows_total"] == 0
    assert metrics["quire_sidecar_cache_entries"] == 2
    assert metrics["quire_sidecar_cache_bytes"] > 0
    assert stream.fill(Row(4, DIGITS), Row(5, json_schema({"type": "integer", "multipleOf": 999_983})))
    metrics = read_metrics(port)
    assert metrics['quire_sidecar_compiles_total{kind="regex",result="cached"}'] == 1
    assert metrics['quire_sidecar_compiles_total{kind="json_schema",result="refused"}'] == 1
    assert metrics["quire_sidecar_compile_timeouts_total"] == 1
    stream.close()
    eventually(lambda: not sidecar.maps(str(stream.path)))
    metrics = read_metrics(port)
    assert (metrics["quire_sidecar_streams"], metrics["quire_sidecar_sequences"]) == (0, 0)
