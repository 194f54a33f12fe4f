"""Finding tags in a text that comes in pieces, however it is split."""

from __future__ import annotations


def split_at(text: str, *tags: str) -> tuple[str, str, str]:
    """(what is before the first of `tags`, which of them it is, the rest).

    If none is there, the second is empty and the third has to wait: the longest end of `text` that a tag could begin
    with.
    """
    places = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    if places:
        place, tag = min(places)
        return text[:place], tag, text[place + len(tag) :]
    for length in range(min(max(map(len, tags)) - 1, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return text[:-length], "", text[-length:]
    return text, "", ""
