"""The process that `quire bench startup` starts: loads the model, draws one token, tells how long each phase took.

`python -m quire.cli.bench.first_token BEGAN FLAGS…`: BEGAN is when it was started, on time.monotonic's clock, which
all processes of a machine share. The flags are those of `quire bench startup`. It prints one line of JSON.
"""

import time

_AWAKE = time.monotonic()

# Whatever is imported below is a part of what is measured.
import json  # noqa: E402
import sys  # noqa: E402

from quire.cli.bench.startup import CONFIG_STATUS, startup_parser  # noqa: E402
from quire.service.errors import ConfigError, QuireError  # noqa: E402


def main(argv: list[str]) -> int:
    """0; or CONFIG_STATUS or 1, with the reason on standard error."""
    began = float(argv[0])
    arguments = startup_parser().parse_args(argv[1:])
    try:
        from quire.cli.bench.engine import describe, open_engine

        imported = time.monotonic()
        with open_engine(arguments, capture=False) as engine:
            loaded = time.monotonic()
            engine.run(engine.workloads.fixed(1, arguments.input_len, 1, arguments.seed), "first token")
            ended = time.monotonic()
            ready = engine.ready
    except QuireError as error:
        print(error.message, file=sys.stderr)
        return CONFIG_STATUS if isinstance(error, ConfigError) else 1
    phases = {"interpreter": _AWAKE - began, "import": imported - _AWAKE, **ready.start_seconds}
    phases |= {"first token": ended - loaded, "all": ended - began}
    print(json.dumps({"model": ready.model, "device": describe(ready.device), "phases": phases}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
