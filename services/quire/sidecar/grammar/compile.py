"""A constraint compiled with llguidance: the plain function, and the tokenizer it needs.

Called by the trial process, which finds out what a constraint costs, and then by the compiler. llguidance limits most
of what a grammar may cost but not all of it, and a thread that compiles can't be stopped: hence the trial.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from quire.service.checkpoint import TextModel
from quire.service.errors import InvalidRequestError, ModelError
from quire.service.request import Constraint, ConstraintKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# One optional blank after a comma or a colon and none elsewhere: what json.dumps and most models write by themselves,
# and no way to write blanks for ever. A schema's own "x-guidance" can't change it.
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": False,
    "lenient": False,
}
_ANY_OBJECT = '{"type": "object"}'

# llguidance's defaults but for the states a lexer may grow to (1 to 2 KB each), and terse errors.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)

# Sets of tokens that llguidance allows or forbids as one where it can: blanks, and text of a JSON string of at most so
# many characters. Its own have 10, 30 and any. With more of them the mask of a string that is nearly as long as it may
# be, which is the most expensive kind, takes three quarters of the time.
_TEXT = r"[^\"\\\x00-\x1F\x7F]"
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_TEXT}{{1,{length}}}" for length in (3, 6, 9, 14, 30)),
    f"{_TEXT}+",
]

# What llguidance says, in the words of the person who wrote the constraint.
_WORDING = (
    (re.compile(r"Unimplemented keys: \[(.*)\]"), r"these keywords are not supported: \1"),
    (re.compile(r"oneOf constraints are not supported.*"), "its oneOf has branches that can overlap: use anyOf"),
    (re.compile(r"NoExtensionBias.*", re.DOTALL), "it allows no output at all"),
    (re.compile(r"recursion limit exceeded.*"), "it is nested too deeply"),
    (re.compile(r"^(?=.*(?:fuel|[Tt]oo many|too big|too large))", re.DOTALL), "it is too large or too ambiguous: "),
    (re.compile(r"\s*<non-verbose/>\s*"), ""),
)
# It repeats the source, which may be a megabyte.
_LINE = 200
_LINES = 10


def build_tokenizer(text: TextModel) -> LLTokenizer:
    """llguidance's view of `text`'s vocabulary: masks of `text.vocab_size` bits, ended by `text.eos_token_ids`.

    Raises ModelError if no output could ever end.
    """
    if not text.eos_token_ids:
        raise ModelError("the model names no end token: set eos_token_id in its generation_config.json", field="model")
    end_tokens = list(text.eos_token_ids)
    return LLTokenizer(text.tokenizer.to_str(), n_vocab=text.vocab_size, eos_token=end_tokens, slices=_SLICES)


def compile_constraint(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """The matcher of an empty output, its first mask computed; sequences start with deep copies of it.

    Raises InvalidRequestError, with the constraint's field, if the constraint is wrong, is not supported, allows no
    output or exceeds llguidance's limits. May take any time and memory.
    """
    try:
        matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS)
    except ValueError as error:
        raise refusal(constraint.kind, str(error)) from error
    if not matcher.is_error():
        # Lexer states that the first mask needs are shared with all copies. Some grammars fail only here.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise refusal(constraint.kind, matcher.get_error())
    return matcher


def refusal(kind: ConstraintKind, reason: str, trouble: str = "can't be compiled") -> InvalidRequestError:
    """The error of a constraint that is in `trouble`; `reason` may be llguidance's own text."""
    if kind is ConstraintKind.REGEX:
        # llguidance makes a grammar of it, of which the user knows nothing.
        reason = reason.rpartition("(in regex): ")[2].partition("\n   1 | start: ")[0]
    lines = [line if len(line) <= _LINE else f"{line[:_LINE]}…" for line in reason.split("\n", _LINES)]
    reason = "\n".join(lines[:_LINES])
    for pattern, words in _WORDING:
        reason = pattern.sub(words, reason)
    field = f"constraint.{kind.value}"
    return InvalidRequestError(f"{field} {trouble}: {reason.strip()}", field=field)


def _grammar(constraint: Constraint) -> str:
    """llguidance's form of the constraint; raises ValueError."""
    source = constraint.source
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        source = _ANY_OBJECT
    elif not source:
        raise ValueError("it is empty")
    if constraint.kind is ConstraintKind.REGEX:
        # llguidance would drop it.
        if re.search(r"(?<!\\)(?:\\\\)*\\$", source):
            raise ValueError("it ends in a backslash that escapes nothing")
        return LLMatcher.grammar_from_regex(source)
    if constraint.kind is ConstraintKind.LARK:
        return LLMatcher.grammar_from_lark(source)
    return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)
