"""A suffix automaton of a growing text: where its end, or another text's, occurred before.

Algorithm: Blumer et al., "The smallest automaton recognizing the subwords of a text", Theoretical Computer Science 40,
1985: a token is added in amortized constant time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

ROOT = 0
_NONE = -1


class SuffixAutomaton:
    """Of `text`. A state stands for substrings that occur at the same places; all end where the longest one does.

    Most states are followed by one token only. That one lies in arrays: about 40 bytes a token in all, where a
    dictionary for each state takes ten times as much.
    """

    def __init__(self) -> None:
        self.text = array("I")
        # By state: the longest substring's length; the state of the longest suffix that occurs elsewhere, too; where it
        # was found last, as the number of tokens before its end; a token that follows, and the state that it leads to.
        self._length = array("i", [0])
        self._link = array("i", [_NONE])
        self._end = array("i", [0])
        self._token = array("q", [_NONE])
        self._target = array("i", [_NONE])
        # The other tokens that follow a state.
        self._others: dict[int, dict[int, int]] = {}
        self._last = ROOT

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Iterable[int]) -> tuple[int, int]:
        """Adds tokens. Returns the length of the longest end of the text that occurred before, and where it ended."""
        found = (0, 0)
        for token in tokens:
            found = self._add(token)
        return found

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Goes on with matching another text, of which `length` tokens up to now lead to `state`: the state and length
        of the longest end of it, with `token`, that occurs in this one. Begins with ROOT and 0."""
        while (target := self._follow(state, token)) == _NONE:
            state = self._link[state]
            if state == _NONE:
                return ROOT, 0
            length = self._length[state]
        return target, length + 1

    def end_of(self, state: int) -> int:
        """Where the substrings of a state were found last: the number of tokens before their end."""
        return self._end[state]

    def _add(self, token: int) -> tuple[int, int]:
        self.text.append(token)
        new = self._new_state(self._length[self._last] + 1, ROOT, len(self.text))
        state = self._last
        while state != _NONE and (target := self._follow(state, token)) == _NONE:
            self._set(state, token, new)
            state = self._link[state]
        if state != _NONE:
            if self._length[target] != self._length[state] + 1:
                target = self._split(state, token, target)
            self._link[new] = target
        self._last = new
        before = self._link[new]
        found = (self._length[before], self._end[before])
        self._end[before] = len(self.text)
        return found

    def _split(self, state: int, token: int, target: int) -> int:
        """A state for those substrings of `target` that occur in more places from now on."""
        clone = self._new_state(self._length[state] + 1, self._link[target], self._end[target])
        self._token[clone], self._target[clone] = self._token[target], self._target[target]
        if target in self._others:
            self._others[clone] = dict(self._others[target])
        while state != _NONE and self._follow(state, token) == target:
            self._set(state, token, clone)
            state = self._link[state]
        self._link[target] = clone
        return clone

    def _follow(self, state: int, token: int) -> int:
        if self._token[state] == token:
            return self._target[state]
        others = self._others.get(state)
        return _NONE if others is None else others.get(token, _NONE)

    def _set(self, state: int, token: int, target: int) -> None:
        if self._token[state] in (token, _NONE):
            self._token[state], self._target[state] = token, target
        else:
            self._others.setdefault(state, {})[token] = target

    def _new_state(self, length: int, link: int, end: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._token.append(_NONE)
        self._target.append(_NONE)
        return len(self._length) - 1
