"""How the user's turn of a dialogue begins; the target goes on with it. Nothing, for a turn of its own choice."""

from __future__ import annotations

import random
from enum import Enum


class Kind(Enum):
    """What a dialogue is about."""

    DIALOGUE = "dialogue"
    JSON = "json"
    CODE = "code"


_SHARES = {Kind.DIALOGUE: 0.6, Kind.JSON: 0.25, Kind.CODE: 0.15}
_FIELDS = (
    *("name", "age", "city", "country", "email", "phone", "date", "price", "product", "company", "title", "author"),
    *("year", "color", "size", "quantity", "address", "rating", "language", "job", "temperature", "distance", "team"),
)
_JSON = (
    "Extract {fields} as JSON: ",
    "Extract the {fields} from this text as JSON.\n\n",
    "Return a JSON object with the keys {fields} for the following sentence: ",
    'Read this and answer with JSON only, with the fields {fields}.\nText: "',
    "Turn this into JSON with {fields}: ",
)
_CODE = (
    "Write a Python function that ",
    "Write a Python class for ",
    "Write a short program in {language} that ",
    "Write a unit test for a function that ",
    "Write a SQL query that ",
    "Show me an example of {language} code that ",
    "How do I {verb} in {language}",
)
_LANGUAGES = ("Python", "JavaScript", "C", "Java", "Go", "Rust", "TypeScript", "Bash")
_VERBS = ("sort a list", "read a file", "parse a date", "call an API", "write a test", "loop over a dictionary")


def opening(rng: random.Random) -> tuple[Kind, str]:
    """One drawn by `rng`, kinds in their shares. What has a beginning is to be ended with the line."""
    kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    if kind is Kind.JSON:
        fields = rng.sample(_FIELDS, rng.randint(2, 4))
        listed = f"{', '.join(fields[:-1])} and {fields[-1]}"
        return kind, rng.choice(_JSON).format(fields=listed)
    if kind is Kind.CODE:
        return kind, rng.choice(_CODE).format(language=rng.choice(_LANGUAGES), verb=rng.choice(_VERBS))
    return kind, ""
