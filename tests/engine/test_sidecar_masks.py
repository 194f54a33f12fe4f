"""SidecarMasks against real sidecars: round trips, two steps in flight, a sidecar that dies, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sidecar_process import DEADLINE, SidecarProcess, allowed_tokens, eventually, json_schema, regex

from quire.engine.masks import DraftResult, MaskBatch, MaskRequest
from quire.engine.sidecar_masks import SidecarMasks
from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.errors import InternalError, InvalidRequestError, UnavailableError

DIGITS = regex("[0-9]{3}")
PERSON = json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})


@pytest.fixture(scope="module")
def smollm() -> TextModel:
    return load_text(locate())


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with SidecarProcess(tmp_path_factory.mktemp("sidecar")) as process:
        process.wait_until_serving()
        yield process


@pytest.fixture
def masks(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> Iterator[SidecarMasks]:
    source = SidecarMasks(sidecar.address, smollm.vocab_size, 4, DEADLINE, tmp_path)
    yield source
    source.close()


def ids(model: TextModel, text: str) -> list[int]:
    return model.tokenizer.encode(text).ids


def allows(model: TextModel, batch: MaskBatch, row: int, token: str) -> bool:
    return model.tokenizer.token_to_id(token) in allowed_tokens(batch.rows[row])


def test_masks_of_a_batch(masks: SidecarMasks, smollm: TextModel) -> None:
    """The engine would sample under other sequences' masks."""
    outputs: list[list[int]] = [ids(smollm, '{"name": "'), []]
    requests = [MaskRequest(1, PERSON, outputs[0]), MaskRequest(2, DIGITS, outputs[1])]
    batch = masks.begin(requests, []).wait()
    assert batch.rows.shape == (2, smollm.vocab_size // 32)
    assert batch.rows.dtype == np.uint32
    assert not batch.errors
    assert allows(smollm, batch, 0, "A")
    assert not allows(smollm, batch, 1, "A")
    assert allows(smollm, batch, 1, "7")
    for output, text in zip(outputs, ('Zoë"}', "123"), strict=True):
        output += ids(smollm, text)
    batch = masks.begin([requests[1], requests[0]], []).wait()
    for row in batch.rows:
        assert list(allowed_tokens(row)) == list(smollm.eos_token_ids)


def test_two_steps_in_flight_do_not_share_rows(masks: SidecarMasks, smollm: TextModel) -> None:
    """An engine that runs one step ahead would read the next step's masks."""
    first = masks.begin([MaskRequest(1, DIGITS, [])], [])
    second = masks.begin([MaskRequest(2, PERSON, [])], [])
    batches = [first.wait(), second.wait()]
    assert allows(smollm, batches[0], 0, "7")
    assert not allows(smollm, batches[0], 0, '{"')
    assert allows(smollm, batches[1], 0, '{"')


def test_one_sequences_error_names_it_alone(masks: SidecarMasks, smollm: TextModel) -> None:
    """One bad request would end its batch, or be sampled without a mask and pass for good."""
    requests = [
        MaskRequest(1, DIGITS, []),
        MaskRequest(2, regex("[z-a]"), []),
        MaskRequest(3, DIGITS, ids(smollm, "x")),
    ]
    batch = masks.begin(requests, []).wait()
    assert sorted(batch.errors) == [2, 3]
    assert isinstance(batch.errors[2], InvalidRequestError)
    assert batch.errors[2].field == "constraint.regex"
    assert isinstance(batch.errors[3], InternalError)
    assert not allows(smollm, batch, 0, "A")
    # Their logits must not all be masked: the draw, though dropped, has to be defined.
    assert (batch.rows[1:] == 0xFFFFFFFF).all()
    assert not masks.begin([MaskRequest(1, DIGITS, []), MaskRequest(2, DIGITS, [])], [2, 3]).wait().errors


def test_released_sequences_may_come_back(masks: SidecarMasks, smollm: TextModel) -> None:
    """A preempted request would go on where it no longer is."""
    assert not masks.begin([MaskRequest(1, DIGITS, ids(smollm, "12"))], []).wait().errors
    assert masks.begin([], [1]).wait().rows.shape == (0, smollm.vocab_size // 32)
    batch = masks.begin([MaskRequest(1, PERSON, [])], []).wait()
    assert allows(smollm, batch, 0, '{"')
    # Fewer tokens than before: it starts over.
    assert not masks.begin([MaskRequest(1, PERSON, ids(smollm, '{"name'))], []).wait().errors
    assert allows(smollm, masks.begin([MaskRequest(1, PERSON, [])], []).wait(), 0, '{"')


def test_three_steps_in_flight(tmp_path: Path, smollm: TextModel) -> None:
    """The third step's masks would be written over the first's."""
    source = SidecarMasks(f"unix:{tmp_path / 'nobody.sock'}", smollm.vocab_size, 4, DEADLINE, tmp_path)
    for sequence in range(2):
        source.begin([MaskRequest(sequence, DIGITS, [])], [])
    with pytest.raises(InternalError, match="the masks of 2 steps are in flight: wait for the first"):
        source.begin([MaskRequest(3, DIGITS, [])], [])
    source.close()


def test_too_many_rows(masks: SidecarMasks) -> None:
    """Rows would be written past the shared file's end."""
    with pytest.raises(InternalError, match="5 mask rows were asked for: the shared file has 4"):
        masks.begin([MaskRequest(sequence, DIGITS, []) for sequence in range(5)], [])


def test_the_file_loses_its_name_at_once(masks: SidecarMasks, sidecar: SidecarProcess, tmp_path: Path) -> None:
    """Engines that are killed would fill the machine's shared memory with their files."""
    assert not masks.begin([MaskRequest(1, DIGITS, [])], []).wait().errors
    assert not list(tmp_path.iterdir())
    assert sidecar.maps(str(tmp_path))


def test_closing_frees_the_sidecars_side(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> None:
    """Each engine that ends would leave its sequences and its memory in the sidecar."""
    source = SidecarMasks(sidecar.address, smollm.vocab_size, 4, DEADLINE, tmp_path)
    assert not source.begin([MaskRequest(1, DIGITS, [])], []).wait().errors
    assert sidecar.maps(str(tmp_path))
    source.close()
    eventually(lambda: not sidecar.maps(str(tmp_path)))


def test_closing_ends_who_waits(tmp_path: Path, smollm: TextModel) -> None:
    """An engine would hang at its end if its sidecar was gone before it."""
    source = SidecarMasks(f"unix:{tmp_path / 'nobody.sock'}", smollm.vocab_size, 4, DEADLINE, tmp_path)
    ticket = source.begin([MaskRequest(1, DIGITS, [])], [])
    source.close()
    assert isinstance(ticket.wait().errors[1], UnavailableError)


def test_a_sidecar_killed_under_open_steps_is_replayed(tmp_path: Path, smollm: TextModel) -> None:
    """Every constrained request of a pod would fail when its sidecar is restarted."""
    with SidecarProcess(tmp_path) as sidecar:
        source = SidecarMasks(sidecar.address, smollm.vocab_size, 4, DEADLINE, tmp_path)
        output = ids(smollm, '{"name": "')
        requests = [MaskRequest(1, PERSON, output), MaskRequest(2, DIGITS, ids(smollm, "12"))]
        before = source.begin(requests, []).wait()
        expected = before.rows.copy()
        sidecar.process.send_signal(signal.SIGSTOP)
        # Asked for while nobody can answer, then lost with the one who was asked.
        first = source.begin(requests, [])
        output += ids(smollm, "Zo")
        second = source.begin(requests[:1], [2])
        # The core goes on appending; the steps that were asked for are those of their time.
        output += ids(smollm, '"}')
        sidecar.restart()
        replayed = first.wait()
        assert not replayed.errors
        assert np.array_equal(replayed.rows, expected)
        batch = second.wait()
        assert allows(smollm, batch, 0, "Ġ")
        assert list(allowed_tokens(source.begin(requests[:1], []).wait().rows[0])) == list(smollm.eos_token_ids)
        source.close()


def test_many_sequences_go_on_where_they_were(tmp_path: Path, smollm: TextModel) -> None:
    """A restart would move some of a batch's sequences back, or mix them up."""
    texts = ['{"name": "Zoë 東京", "tags": [1, {"x": null}]}', '{"name": "A"}', "123"]
    outputs = [ids(smollm, texts[number % 3]) for number in range(48)]
    with SidecarProcess(tmp_path) as sidecar, SidecarProcess(_folder(tmp_path / "undisturbed")) as other:
        sources = [
            SidecarMasks(process.address, smollm.vocab_size, 2 * len(outputs), DEADLINE, tmp_path)
            for process in (sidecar, other)
        ]
        for step in range(max(map(len, outputs))):
            requests = [
                MaskRequest(
                    number, DIGITS if number % 3 == 2 else PERSON, output[:step], f"tenant {number % 2}", drafts
                )
                for number, output in enumerate(outputs)
                if step < len(output)
                for drafts in (output[step : step + number % 2],)
            ]
            tickets = [source.begin(requests, []) for source in sources]
            if step == 5:
                sidecar.restart()
            batches = [ticket.wait() for ticket in tickets]
            assert not batches[0].errors
            assert np.array_equal(batches[0].rows, batches[1].rows), step
            assert batches[0].results == batches[1].results
        for source in sources:
            source.close()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_drafts_have_rows_of_their_own(masks: SidecarMasks, smollm: TextModel) -> None:
    """Speculation would read the mask of one position for another, or of another sequence."""
    digits, name = ids(smollm, "12"), ids(smollm, '{"')
    batch = masks.begin(
        [MaskRequest(1, DIGITS, [], drafts=[*digits[:1], 0]), MaskRequest(2, PERSON, name, max_forced=9)], []
    ).wait()
    assert batch.rows.shape == (4, smollm.vocab_size // 32)
    assert batch.results[1] == DraftResult(1)
    assert batch.results[2].num_drafts == 0
    assert smollm.tokenizer.decode(list(batch.results[2].forced)) == "name"
    assert allows(smollm, batch, 1, "7")
    assert allows(smollm, batch, 3, "name")
    # Drafts are not consumed; those that are kept come as output.
    batch = masks.begin([MaskRequest(1, DIGITS, digits[:1], drafts=digits[1:]), MaskRequest(3, DIGITS, [])], [2]).wait()
    assert allows(smollm, batch, 1, "7")
    assert not allows(smollm, batch, 1, "A")


def test_a_sidecar_that_stays_away_costs_the_deadline_and_no_more(tmp_path: Path, smollm: TextModel) -> None:
    """The engine's loop would hang for ever, or never find the sidecar again."""
    with SidecarProcess(tmp_path) as sidecar:
        sidecar.wait_until_serving()
        source = SidecarMasks(sidecar.address, smollm.vocab_size, 4, 2.0, tmp_path)
        eventually(lambda: not source.begin([MaskRequest(1, DIGITS, [])], []).wait().errors)
        sidecar.kill()
        begin = time.monotonic()
        batch = source.begin([MaskRequest(1, DIGITS, []), MaskRequest(2, DIGITS, [])], []).wait()
        assert 1.5 < time.monotonic() - begin < 10
        assert {type(error) for error in batch.errors.values()} == {UnavailableError}
        assert list(batch.errors) == [1, 2]
        assert (batch.rows == 0xFFFFFFFF).all()
        sidecar.restart()
        sidecar.wait_until_serving()
        eventually(lambda: not source.begin([MaskRequest(3, DIGITS, [])], []).wait().errors)
        source.close()


def test_a_late_answer_belongs_to_nobody(tmp_path: Path, smollm: TextModel) -> None:
    """A sidecar that was slow once would answer every later step with the masks of the one before."""
    with SidecarProcess(tmp_path) as sidecar:
        sidecar.wait_until_serving()
        source = SidecarMasks(sidecar.address, smollm.vocab_size, 4, 1.0, tmp_path)
        eventually(lambda: not source.begin([MaskRequest(1, DIGITS, [])], []).wait().errors)
        sidecar.process.send_signal(signal.SIGSTOP)
        assert source.begin([MaskRequest(1, DIGITS, ids(smollm, "1"))], []).wait().errors
        sidecar.process.send_signal(signal.SIGCONT)
        # The first that comes in time.
        batch = source.begin([MaskRequest(2, PERSON, [])], [1]).wait()
        while batch.errors:
            assert {type(error) for error in batch.errors.values()} == {UnavailableError}
            batch = source.begin([MaskRequest(2, PERSON, [])], []).wait()
        assert allows(smollm, batch, 0, '{"')
        source.close()


def test_another_model_fails_at_once(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> None:
    """An engine and a sidecar of different models would wait for each other, or mask the wrong tokens."""
    source = SidecarMasks(sidecar.address, smollm.vocab_size + 32, 4, DEADLINE, tmp_path)
    error = source.begin([MaskRequest(1, DIGITS, [])], []).wait().errors[1]
    assert isinstance(error, InternalError)
    assert "start both with the same --model" in error.message
    source.close()
    assert not list(tmp_path.iterdir())


_ENGINE = """
import sys
from pathlib import Path
from quire.engine.masks import MaskRequest
from quire.engine.sidecar_masks import SidecarMasks
from quire.service.request import Constraint, ConstraintKind
source = SidecarMasks(sys.argv[1], int(sys.argv[2]), 4, 60.0, Path(sys.argv[3]))
request = MaskRequest(1, Constraint(ConstraintKind.REGEX, "[0-9]+"), [])
print(source.begin([request], []).wait().errors, flush=True)
sys.stdin.read()
"""


def test_an_engine_that_is_killed_leaves_nothing(sidecar: SidecarProcess, smollm: TextModel, tmp_path: Path) -> None:
    """Each crash of an engine would cost the pod the memory of its masks."""
    command = [sys.executable, "-c", _ENGINE, sidecar.address, str(smollm.vocab_size), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"{}\n"
        assert sidecar.maps(str(tmp_path))
        os.kill(engine.pid, signal.SIGKILL)
    eventually(lambda: not sidecar.maps(str(tmp_path)))
    assert not list(tmp_path.iterdir())
