"""A child process of the sidecar that finds out whether a constraint can be compiled at all.

Run by `trials` as `python -m quire.sidecar.grammar.trial MODEL LIMITS`. It reads one JSON object a line from standard
input, {"kind", "source"}, and answers each with one line: {"bytes": memory it takes} or {"refused": the message,
"timed_out": whether its time was up}.
Each constraint is compiled in a fork of this process: the kernel ends the fork when its time is up, whatever
llguidance is doing, and its memory is limited and given back. The process ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

from llguidance import LLTokenizer

from quire.service.checkpoint import load_text, locate
from quire.service.errors import InvalidRequestError
from quire.service.request import Constraint, ConstraintKind
from quire.sidecar.grammar.compile import build_tokenizer, compile_constraint, refusal
from quire.sidecar.grammar.explain import explained
from quire.sidecar.grammar.memory import resident_bytes, virtual_bytes


def main(model: str, compile_seconds: float, compile_mib: int) -> None:
    """Answers constraints until standard input ends."""
    # Ctrl-C reaches the whole terminal; the sidecar closes standard input when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = build_tokenizer(load_text(locate(model)))
    _answer({})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        constraint = Constraint(ConstraintKind(request["kind"]), request["source"])
        _answer(_try_in_fork(tokenizer, constraint, compile_seconds, compile_mib))


def _answer(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()


def _try_in_fork(tokenizer: LLTokenizer, constraint: Constraint, seconds: float, mib: int) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        # Whatever happens, this copy must not return into the parent's loop.
        try:
            _limit(seconds, mib)
            os.write(writer, json.dumps(_compile(tokenizer, constraint)).encode())
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reply = pipe.read()
    _, status = os.waitpid(child, 0)
    if reply:
        return dict(json.loads(reply))
    reason = f"it needs more than {mib} MiB of memory, or nests too deeply: make it smaller"
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    if timed_out:
        reason = f"it takes longer than {seconds:g} s: make it smaller or less ambiguous"
    return {"refused": refusal(constraint.kind, reason).message, "timed_out": timed_out}


def _compile(tokenizer: LLTokenizer, constraint: Constraint) -> dict[str, Any]:
    before = resident_bytes()
    try:
        with explained(constraint):
            compile_constraint(tokenizer, constraint)
    except InvalidRequestError as error:
        return {"refused": error.message}
    return {"bytes": resident_bytes() - before}


def _limit(seconds: float, mib: int) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (now := virtual_bytes()) > 0:
        resource.setrlimit(resource.RLIMIT_AS, (now + (mib << 20),) * 2)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
