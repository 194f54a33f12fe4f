"""Arguments by name: an unknown one is answered with the nearest, one of vLLM's that is not supported with advice."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from quire.service.errors import InvalidRequestError, QuireError

T = TypeVar("T")

# For each argument of vLLM's that is not supported: the values that change nothing, and what to do instead.
Unsupported = Mapping[str, tuple[tuple[object, ...], str]]

_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")


class ArgumentError(InvalidRequestError, TypeError):
    """An argument that is not known, not supported, or of a wrong type. Also a TypeError, which Python would raise."""


def check_arguments(what: str, given: Mapping[str, object], known: Collection[str], unsupported: Unsupported) -> None:
    """Raises ArgumentError for the first of `given` that is neither known nor an unsupported one that changes nothing.

    `what` is the function or class that they were given to.
    """
    for name, value in given.items():
        if name in known:
            continue
        if name not in unsupported:
            close = difflib.get_close_matches(name, [*known, *unsupported], n=1)
            advice = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            raise ArgumentError(f"{what} has no argument {name!r}: {advice}", field=name)
        harmless, advice = unsupported[name]
        # True is not 1 here.
        if not any(type(value) is type(passing) and value == passing for passing in harmless):
            raise ArgumentError(f"{name} is {value!r}, which is not supported: {advice}", field=name)


def named_arguments(unsupported: Unsupported) -> Callable[[type[T]], type[T]]:
    """A decorator for dataclasses: checks the names that one is made with, and drops unsupported ones."""

    def decorate(cls: type[T]) -> type[T]:
        make: Callable[..., None] = cls.__init__
        known = list(inspect.signature(cls).parameters)

        @functools.wraps(make)
        def __init__(self: T, *arguments: Any, **named: Any) -> None:  # noqa: N807
            check_arguments(cls.__name__, named, known, unsupported)
            make(self, *arguments, **{name: value for name, value in named.items() if name in known})

        cls.__init__ = __init__  # type: ignore[assignment]
        return cls

    return decorate


def in_python(error: QuireError) -> QuireError:
    """The error of a service's command line, in the words of someone who calls a function: flags become arguments."""
    message = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), error.message)
    return type(error)(message, field=error.field)


def without_prefix(error: InvalidRequestError) -> InvalidRequestError:
    """The error of a part of the contract ("sampling.top_p is 2: …"), with the argument's bare name."""
    name = error.field.rpartition(".")[2]
    return InvalidRequestError(error.message.replace(error.field, name, 1), field=name)


def check_number(name: str, value: object, *, whole: bool = False, optional: bool = False) -> None:
    """Raises ArgumentError if `value` is no number (no whole one if `whole`)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kind = "a whole number" if whole else "a number"
        raise ArgumentError(f"{name} is {value!r}: give {kind}{' or None' if optional else ''}", field=name)
