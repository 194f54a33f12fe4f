"""What a head is evaluated on, unless somebody names prompts of their own. They are not put into training data."""

from __future__ import annotations

import json
from pathlib import Path

from quire.service.errors import ConfigError

PROMPTS: dict[str, tuple[str, ...]] = {
    "dialogue": (
        "What is the capital of France?",
        "Write a short story about a lighthouse keeper who finds a message in a bottle.",
        "Explain photosynthesis to a ten-year-old.",
        "Why is the sky blue, and why are sunsets red?",
        "Give me three tips for sleeping better.",
        "Write an email to my landlord about a leaking tap.",
        "What is the difference between weather and climate?",
        "Plan a weekend in Lisbon for two people who like food.",
        "Summarize the plot of Romeo and Juliet in four sentences.",
        "How does a refrigerator work?",
        "I want to start running. How do I begin?",
        "What should I consider before I adopt a dog?",
    ),
    "json": (
        "Extract name and age as JSON: Maria Lopez is 34 years old and lives in Lima.",
        "Extract the product, price and color as JSON: The red kettle costs 24 dollars this week.",
        "Return a JSON object with the keys title, author and year: Dune was written by Frank Herbert in 1965.",
        "Turn this into JSON with city, country and temperature: It is 31 degrees in Cairo, Egypt today.",
        "Extract the name, email and phone as JSON: Write to Tom Reed at tom@example.com or call 555-0134.",
        "List three fruits and their colors as a JSON array of objects.",
        "Extract the team, date and city as JSON: The Bears play in Chicago on the 4th of May.",
        "Return JSON with the fields company, job and address: Ana is a baker at Crumb & Co, 12 Mill Road.",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number.",
        "Write a Python function that checks whether a string is a palindrome.",
        "Write a SQL query that counts orders per customer.",
        "Write a JavaScript function that removes duplicates from an array.",
    ),
}


def read_prompts(file: Path | None) -> list[tuple[str, str]]:
    """Pairs of a kind and what a user says: `file` has one a line, as text or as {"kind", "prompt"}; None: PROMPTS.

    Raises ConfigError.
    """
    if file is None:
        return [(kind, prompt) for kind, prompts in PROMPTS.items() for prompt in prompts]
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file} can't be read: {error}", field="prompts") from error
    if not lines:
        raise ConfigError(f"--prompts {file} is empty: write one prompt a line", field="prompts")
    return [_prompt(file, number, line) for number, line in enumerate(lines, 1)]


def _prompt(file: Path, number: int, line: str) -> tuple[str, str]:
    if not line.lstrip().startswith("{"):
        return "prompts", line
    try:
        read = json.loads(line)
        return str(read.get("kind", "prompts")), str(read["prompt"])
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f'--prompts {file}: line {number} must be text or {{"kind": …, "prompt": …}}', field="prompts"
        ) from error
