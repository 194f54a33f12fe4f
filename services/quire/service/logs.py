"""One readable log: a line per event, on standard error, as text for people or JSON for collectors.

Call `setup_logging` once, in a process's main. Modules log through `logging.getLogger(__name__)`; facts go into
`extra={"request_id": …}` and come out as key=value (text) or members (JSON).
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime
from enum import Enum

from quire.service.errors import ErrorCode, QuireError

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LogFormat(Enum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        facts = "".join(f" {name}={value}" for name, value in _facts(record).items())
        line = f"{time} {record.levelname:<7} {self._process:<10} {record.getMessage()}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup_logging(process: str, *, level: str = "info", style: LogFormat = LogFormat.TEXT) -> None:
    """Sends this process's log to standard error. `process` names it in each line ("gateway", "engine-0")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process) if style is LogFormat.JSON else _TextFormatter(process))
    # No line tells them, and each costs every line a look.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def facts_of(error: QuireError) -> dict[str, object]:
    """What a request's line in the log says of its error.

    What a request is refused with quotes it, and what a client writes is no matter for the log: then only the field.
    """
    if error.code is ErrorCode.INVALID_ARGUMENT:
        return {"code": error.code.value, "field": error.field}
    return {"code": error.code.value, "error": error.message}


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
