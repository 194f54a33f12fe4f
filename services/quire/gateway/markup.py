"""Finding a tag in a text that comes in pieces, however it is split."""

from __future__ import annotations


def split_at(text: str, tag: str) -> tuple[str, bool, str]:
    """(what is before `tag`, whether it is there, the rest).

    If it is not there, the rest is what has to wait: the longest end of `text` that `tag` could begin with.
    """
    before, found, rest = text.partition(tag)
    if found:
        return before, True, rest
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length], False, text[-length:]
    return text, False, ""
