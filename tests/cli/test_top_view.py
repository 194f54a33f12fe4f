"""`quire top`: what it makes of counts, and what it draws in a window of any size."""

from __future__ import annotations

import numpy as np
import pytest
from engine_answers import BOUNDS, Clock, answer_of, stats_of, watch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from quire.cli.engine_watch import EngineWatch
from quire.cli.figures import bar, count, duration, elapsed
from quire.cli.history import History, quantile
from quire.cli.page_view import page_lines
from quire.cli.top_view import Size, page, screen, sparkline
from quire.v1 import engine_pb2


def plain(lines: object) -> list[str]:
    return str(lines).splitlines()


@given(st.lists(st.floats(0.001, 9.9), min_size=1, max_size=200), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_lie_in_the_right_bucket(values: list[float], share: float) -> None:
    """A median that is read from the wrong bucket is off by a factor of ten and looks like any other."""
    counts = [0] * (len(BOUNDS) + 1)
    for value in values:
        counts[int(np.searchsorted(BOUNDS, value))] += 1
    true = float(np.quantile(values, share, method="inverted_cdf"))
    found = quantile(BOUNDS, counts, share)
    bucket = int(np.searchsorted(BOUNDS, true))
    assert found is not None and (BOUNDS[bucket - 1] if bucket else 0.0) <= found <= BOUNDS[bucket]


def test_quantiles_at_the_ends() -> None:
    """Nothing measured is not a time of zero, and what is above all bounds must not break the arithmetic."""
    assert quantile(BOUNDS, [0, 0, 0, 0, 0], 0.5) is None and quantile([], [], 0.5) is None
    assert quantile(BOUNDS, [0, 0, 0, 0, 3], 0.5) == 10.0
    assert quantile(BOUNDS, [0, 4, 0, 0, 0], 0.5) == pytest.approx(0.055)


def test_speeds_are_what_happened_between_two_looks() -> None:
    """A speed since the start would hide for hours that an engine has stopped."""
    history = History()
    history.add(10.0, 1, stats_of(5, prompt=1000, cached=200, output=50, firsts=10))
    assert not history.speeds
    history.add(12.0, 1, stats_of(9, prompt=1600, cached=400, output=90, firsts=14))
    (speed,) = history.speeds
    assert (speed.prefill, speed.decode) == ((600 - 200) / 2, 40 / 2)
    window = history.window()
    assert window.seconds == 2.0 and window.hit_rate == pytest.approx(200 / 600)
    assert window.tokens_per_step == (400 + 36) / 4
    assert window.first_token is not None and 0.01 < window.first_token.p50 <= 0.1


def test_drafts_are_no_prompts_and_their_shares_are_of_the_window() -> None:
    """Verified drafts would look like prompts that are computed, and the shares of a bad hour would stay for a day."""
    before = stats_of(5, prompt=1000, output=50, firsts=10)
    before.verified_at.extend([40])
    before.computed_tokens += 40
    before.drafters.add(name="suffix", drafted_tokens=80, verified_tokens=40)
    # Ten steps of one request drew 25 tokens: 15 of 20 drafts were right.
    after = stats_of(15, prompt=1000, output=60, firsts=10)
    after.output_tokens += 15
    after.verified_at.extend([50, 10])
    after.accepted_at.extend([10, 5])
    after.computed_tokens += 60
    after.drafters.add(name="suffix", drafted_tokens=90, verified_tokens=45, accepted_tokens=3)
    after.drafters.add(name="forced", drafted_tokens=20, verified_tokens=15, accepted_tokens=12)
    watch = watch_of(answer_of(running=1, stats=before), answer_of(running=1, stats=after))
    (speed,) = watch.history.speeds
    assert (speed.prefill, speed.decode) == (0, 25)
    drafts = watch.history.window().drafts
    assert drafts is not None and drafts.drafters == ("forced", "suffix")
    assert (drafts.accepted, drafts.accepted_at, drafts.drawn_per_step) == (0.75, (1.0, 0.5), 2.5)
    text = page([watch], 120).plain
    assert "75% of drafts right (forced+suffix) █▅" in text and "tokens drawn a step" in text and "2.50" in text
    assert "drafts" not in page([watch_of(answer_of(), answer_of())], 120).plain


def test_the_last_minute_forgets_what_was_before() -> None:
    """A slow first request must not colour the numbers for the rest of the day."""
    history = History()
    history.add(0.0, 1, stats_of(1, prompt=100, output=20, firsts=1, slow=19))
    history.add(1.0, 1, stats_of(2, prompt=100, output=20, firsts=1, slow=19))
    # Nobody asks for anything: the numbers are those since the start, as `seconds` says.
    window = history.window()
    assert window.seconds is None and window.inter_token is not None and window.inter_token.p50 > 0.1
    history.add(30.0, 1, stats_of(9, prompt=100, output=60, firsts=1, slow=19))
    window = history.window()
    assert window.seconds == 30.0 and window.inter_token is not None and window.inter_token.p99 <= 0.01
    history.add(80.0, 1, stats_of(30, prompt=100, output=70, firsts=1, slow=29))
    window = history.window()
    assert window.seconds == 50.0 and window.inter_token is not None and window.inter_token.p50 > 0.1


def test_an_engine_that_was_started_again_counts_from_zero() -> None:
    """Its counts are smaller than before: speeds would be negative, and the last minute another engine's."""
    history = History()
    history.add(0.0, 1, stats_of(5, prompt=1000, output=500, firsts=9))
    history.add(1.0, 2, stats_of(1, prompt=10, output=1, firsts=1))
    assert not history.speeds and history.window().seconds is None
    history.add(2.0, 2, stats_of(2, prompt=10, output=2, firsts=1))
    assert [speed.decode for speed in history.speeds] == [1.0]


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (7.4, "7"), (1234, "1,234"), (9999, "9,999"), (12_345, "12.3k"), (2.5e6, "2.5M")]
)
def test_counts_fit_their_column(value: float, shown: str) -> None:
    """A number that is wider than its column shifts all others."""
    assert count(value) == shown and len(shown) <= 6


def test_times_are_short() -> None:
    """Milliseconds where they matter, hours where they add up."""
    assert [duration(value) for value in (0.0004, 0.0234, 0.9996, 9.96, 61)] == [
        "0.4 ms",
        "23 ms",
        "1.0 s",
        "10 s",
        "1:01",
    ]
    assert [elapsed(value) for value in (0.001, 3599.6, 7322)] == ["0.0 s", "1:00:00", "2:02:02"]


def test_a_sparkline_tells_little_from_nothing() -> None:
    """A trickle that is drawn as silence is not looked for."""
    assert sparkline([0, 1, 500, 1000], 10) == " ▁▅█" and sparkline([1, 2, 3], 2) == "▆█" and sparkline([], 5) == ""
    assert sparkline([5, 5], 0) == ""
    assert [bar(share, 4).plain for share in (0, 0.5, 0.53, 1, 7)] == ["────", "██──", "██▏─", "████", "████"]


def test_pages_of_every_kind() -> None:
    """The map must be readable without colours, in a log or by someone who does not see them."""
    caption, row = page_lines(answer_of(pages="uusccff"), 20, 1)
    assert caption.plain == "7 pages  █ 2 used  ▓ 1 shared  ░ 2 cached  · 2 free"
    assert row.plain == "██▓░░··"
    caption, row = page_lines(answer_of(pages="uuuuuffusscccfffffffu"), 6, 1)
    assert caption.plain.startswith("21 pages, 4 to a mark  █ 7 used  ▓ 2 shared")
    assert row.plain == "█▄▄░·█"


@given(st.text("uscf", min_size=1, max_size=300), st.integers(1, 40), st.integers(1, 10))
def test_no_page_is_lost_when_they_are_merged(pages: str, width: int, rows: int) -> None:
    """One page in use among thousands is what somebody looks for."""
    _, *drawn = page_lines(answer_of(pages=pages), width, rows)
    marks = "".join(line.plain for line in drawn)
    assert len(drawn) <= rows and max(len(line) for line in drawn) <= width
    size = -(-len(pages) // (width * rows))
    for index, mark in enumerate(marks):
        cell = pages[index * size : (index + 1) * size]
        assert (mark == "·") == (set(cell) == {"f"}) and (mark == "░") == (
            bool(set(cell) - {"f"}) and not set(cell) & {"u", "s"}
        )


def watches(num_engines: int, running: int, waiting: int) -> list[EngineWatch]:
    phases = [engine_pb2.ENGINE_PHASE_READY, engine_pb2.ENGINE_PHASE_LOADING, engine_pb2.ENGINE_PHASE_FAILED]
    found = []
    for index in range(num_engines):
        answer = answer_of(
            phases[index % 3], name=f"engine-{index}", running=running, waiting=waiting, pages="uuscf" * 200
        )
        answer.status.activity, answer.status.failure = "loading weights", "the engine's core process died: see the log"
        answer.stats.CopyFrom(stats_of(3, prompt=10**6, output=10**5, firsts=3))
        found.append(watch_of(answer_of(name=f"engine-{index}"), answer, url="http://127.0.0.1:8000"))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 4),
    st.integers(20, 200),
    st.integers(4, 60),
    st.integers(0, 8),
    st.integers(0, 40),
)
def test_a_screen_fits_its_window(
    num_engines: int, selected: int, width: int, height: int, running: int, waiting: int
) -> None:
    """A line too long or too many scrolls the rest away, and the picture jumps."""
    drawn = screen(
        watches(num_engines, running, waiting), min(selected, max(0, num_engines - 1)), Size(width, height), "q quits "
    )
    lines = drawn.plain.splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_a_small_window_shows_what_matters() -> None:
    """80 columns by 24 lines is what a terminal opens with."""
    lines = plain(screen(watches(1, 8, 12), 0, Size(80, 24), "q quits "))
    assert lines[0].startswith(" quire top   tiny  http://127.0.0.1:8000") and lines[0].endswith("q quits ")
    text = "\n".join(lines)
    for word in ("prefill", "decode", "8 of 8", "queue", "hit rate", "time to first token", "inter-token time", "p50"):
        assert word in text, word
    assert "1,000 pages" in text and sum("decode" in line and "/200" in line for line in lines) == 8
    assert lines[-1].startswith(" and ") and lines[-1].endswith(" more")
    hidden = int(lines[-1].split()[1])
    assert hidden + sum("/200" in line for line in lines) == 20 and len(lines) == 24


def test_a_large_window_has_pages_beside_the_batch() -> None:
    """A page for each character, and every request."""
    lines = plain(screen(watches(1, 8, 12), 0, Size(160, 50), "q quits "))
    assert any("1,000 pages  █" in line and "request" in line for line in lines)
    assert sum("/200" in line for line in lines) == 20 and not any("more" in line for line in lines)


def test_what_is_old_is_said_to_be() -> None:
    """An engine in a long step does not answer: its numbers must not pass for those of this moment."""
    clock = Clock()
    watch = EngineWatch("unix:/e.sock", clock=clock)
    watch.take(answer_of())
    clock.now += 60  # between two looks nobody waits
    assert "in a step" not in screen([watch], 0, Size(80, 24), "").plain
    watch.ask()
    clock.now += 7
    assert "in a step for 7.0 s" in screen([watch], 0, Size(80, 24), "").plain
    watch.take(answer_of())
    assert "in a step" not in screen([watch], 0, Size(80, 24), "").plain


def test_several_engines_have_a_line_each() -> None:
    """One that fails among many must be seen without looking for it."""
    lines = plain(screen(watches(3, 2, 0), 1, Size(100, 30), "q quits "))
    assert [line.split()[0] for line in lines[2:5]] == ["engine-0", "▸", "engine-2"]
    assert "loading weights" in lines[3] and "it failed: the engine's core process died" in lines[4]
    assert lines[5].startswith("─ engine-1 ─ loading ─")
    text = page(watches(3, 2, 0), 100).plain
    assert all(f"─ engine-{index} ─" in text for index in range(3))


def test_a_request_id_is_only_text() -> None:
    """An id is its sender's: it must not clear the screen of whoever watches."""
    answer = answer_of(running=1)
    answer.sequences[0].request_id = "\x1b[2J[red]evil\n"
    console = Console(width=100, force_terminal=True)
    with console.capture() as capture:
        console.print(screen([watch_of(answer)], 0, Size(100, 30), ""))
    assert "\x1b[2J" not in capture.get() and "?[2J[red]evil?" in capture.get()
