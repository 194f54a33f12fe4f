"""Tokens to text: the detokenizer and the matcher of stop strings, against their definitions."""

from __future__ import annotations

import pytest
from gateway_testing import sentence_piece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece

from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.errors import ModelError
from quire.service.text import Detokenizer, OutputText, Pieces, StopMatcher

# Fixtures of wider scope than a function keep nothing between examples.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["👩‍👩‍👧‍👦 family", "naïve café", "日本語のテキスト", "🇫🇷🏴󠁧󠁢󠁳󠁣󠁴󠁿", "\ufffd", "a\u0301", "<|im_end|>", "𐍈\x00\r\n"]
)


@pytest.fixture(scope="session")
def text_model() -> TextModel:
    return load_text(locate())


@pytest.fixture(scope="session")
def pieces(text_model: TextModel) -> Pieces:
    return Pieces(text_model.tokenizer, text_model.eos_token_ids)


def detokenize(pieces: Pieces, token_ids: list[int], sizes: list[int], *, strip: bool = False) -> list[str]:
    """The deltas when tokens come in steps of `sizes` (used round and round)."""
    detokenizer = Detokenizer(pieces, strip_leading=strip)
    deltas, start, turn = [], 0, 0
    while start < len(token_ids):
        size = sizes[turn % len(sizes)]
        deltas.append(detokenizer.feed(token_ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*deltas, detokenizer.flush()]


steps = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@SHARED
@given(text=texts, sizes=steps)
def test_text_round_trips(text_model: TextModel, pieces: Pieces, text: str, sizes: list[int]) -> None:
    """Without it any text could come back changed, or a delta could show a broken character on the way."""
    token_ids = text_model.tokenizer.encode(text, add_special_tokens=False).ids
    deltas = detokenize(pieces, token_ids, sizes)
    whole = text_model.tokenizer.decode(token_ids)  # the vocabulary lacks some bytes, so not always `text`
    assert "".join(deltas) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in delta for delta in deltas)


@SHARED
@given(token_ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=40), sizes=steps)
@example(token_ids=[235, 119, 235, 235, 119, 1, 2, 235], sizes=[1])
def test_any_tokens_equal_whole_decode(
    text_model: TextModel, pieces: Pieces, token_ids: list[int], sizes: list[int]
) -> None:
    """Without it tokens that are no valid UTF-8, special tokens or a cut character could lose or double text."""
    assert "".join(detokenize(pieces, token_ids, sizes)) == text_model.tokenizer.decode(token_ids)


def test_character_comes_whole(text_model: TextModel, pieces: Pieces) -> None:
    """Without it an emoji's first token would show as a replacement character."""
    token_ids = text_model.tokenizer.encode("👩", add_special_tokens=False).ids
    assert len(token_ids) > 1
    detokenizer = Detokenizer(pieces)
    assert [detokenizer.feed([token_id]) for token_id in token_ids] == [*[""] * (len(token_ids) - 1), "👩"]


WORD_IDS = st.lists(st.integers(0, 8), max_size=6)
CHARACTERS = texts.map(lambda text: [9 + byte for byte in text.encode()])


@SHARED
@given(token_ids=st.lists(WORD_IDS | CHARACTERS, max_size=6).map(lambda runs: [i for run in runs for i in run]))
def test_sentence_piece_equals_whole_decode(token_ids: list[int]) -> None:
    """Without it Llama 2's tokenizers would lose spaces or show byte tokens."""
    tokenizer = sentence_piece()
    assert "".join(detokenize(Pieces(tokenizer), token_ids, [1], strip=True)) == tokenizer.decode(token_ids)


def test_completion_keeps_leading_space() -> None:
    """Without it "Hello" would be completed to "Helloworld"."""
    tokenizer = sentence_piece()
    assert "".join(detokenize(Pieces(tokenizer), [3, 4], [1])) == " world!"
    assert "".join(detokenize(Pieces(tokenizer), [3, 4], [1], strip=True)) == "world!"


def test_metaspace_decoder() -> None:
    """Without it tokenizers saved in the newer form of SentencePiece would show lower bars."""
    tokenizer = sentence_piece()
    tokenizer.decoder = decoders.Metaspace()
    assert "".join(detokenize(Pieces(tokenizer), [2, 3, 4], [1], strip=True)) == tokenizer.decode([2, 3, 4])


def test_unknown_decoder_is_refused() -> None:
    """Without it a tokenizer we can't decode would produce wrong text instead of an error at the start."""
    tokenizer = Tokenizer(WordPiece({"a": 0}, unk_token="a"))
    with pytest.raises(ModelError, match="no decoder"):
        Pieces(tokenizer)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        Pieces(tokenizer)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the first position at which a stop string ends, cut where the longest such one begins."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def could_become(held: str, stops: list[str]) -> bool:
    return any(stop.startswith(held) for stop in stops)


few_letters = st.text("ab\n", min_size=1, max_size=6)


@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=20),
    stops=st.lists(few_letters, min_size=1, max_size=4),
)
@example(pieces=["aab", "aab", "aaa"], stops=["aabaaa"])
def test_stop_strings_by_definition(pieces: list[str], stops: list[str]) -> None:
    """Without it part of a stop string could leak, text could be held for no reason, or the wrong match win."""
    matcher = StopMatcher(stops)
    whole, shown = "".join(pieces), ""
    seen = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        seen += piece
        if matcher.stopped:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or could_become(held, stops)
        assert not any(could_become(seen[start:], stops) for start in range(len(shown)))
    if not matcher.stopped:
        shown += matcher.flush()
    assert (shown, matcher.stopped) == cut(whole, stops)


def test_stop_string_costs_linear_time() -> None:
    """Without it a long stop string of one letter could cost time quadratic in the output's length."""
    stop, steps_taken = "a" * 5000 + "b", 0

    class Counting(StopMatcher):
        def _step(self, character: str) -> int:
            nonlocal steps_taken
            steps_taken += 1
            return super()._step(character)

    matcher = Counting([stop])
    for _ in range(20_000):
        matcher.feed("a")
    assert steps_taken == 20_000


@pytest.mark.parametrize("stop", ["Paris", "of Fr", " is Paris.", "T"])
def test_stop_across_tokens(text_model: TextModel, pieces: Pieces, stop: str) -> None:
    """Without it a stop string that lies across tokens could be missed."""
    text = "The capital of France is Paris."
    detokenizer, matcher = Detokenizer(pieces), StopMatcher([stop])
    token_ids = text_model.tokenizer.encode(text).ids
    shown = "".join(matcher.feed(detokenizer.feed([token_id])) for token_id in token_ids if not matcher.stopped)
    assert matcher.stop_string == stop
    assert shown == text[: text.index(stop)]


def test_min_tokens_are_not_searched(text_model: TextModel, pieces: Pieces) -> None:
    """Without it an output could end on a stop string before it has the tokens that were asked for."""
    token_ids = text_model.tokenizer.encode("stop it, then stop").ids

    def cut(min_tokens: int) -> tuple[str, str | None, int]:
        output = OutputText(Detokenizer(pieces), ("stop",), min_tokens=min_tokens)
        return output.feed(token_ids) + output.flush(), output.stop_string, output.num_tokens

    assert cut(0) == ("", "stop", len(text_model.tokenizer.encode("stop").ids))
    assert cut(2) == ("stop it, then ", "stop", len(token_ids))
    assert cut(len(token_ids)) == ("stop it, then stop", None, len(token_ids))
