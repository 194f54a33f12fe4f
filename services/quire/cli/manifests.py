"""`quire manifests render`: prints what an InferenceService becomes in a cluster, without one."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from quire.cli.flags import Parser
from quire.operator.config import Images
from quire.operator.render import render
from quire.service.errors import ConfigError

_DESCRIPTION = """\
Prints the Deployments, Services and all else that the operator makes of the
InferenceServices in a file. No cluster is asked. Pipe it to
`kubectl diff -f -` to see what is different in one."""

_EXAMPLES = """\
  quire manifests render manifests/samples/smollm2.yaml
      what a service with all defaults becomes
  quire manifests render - < service.yaml
      from standard input
  quire manifests render service.yaml --image-prefix registry.example/quire/
      with images from a registry"""


def main(argv: list[str]) -> int:
    """Prints YAML. Raises ConfigError."""
    arguments = _parser().parse_args(argv)
    defaults = Images()
    names = {each.name: arguments.image_prefix + getattr(defaults, each.name) for each in fields(defaults)}
    sys.stdout.write(render(_read(arguments.file), Images(**names)))
    return 0


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {file}: {error}") from error


def _parser() -> Parser:
    parser = Parser("manifests", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("action", choices=["render"], help="what to do with the file")
    parser.add_argument("file", metavar="FILE", help="YAML with services; - is standard input")
    parser.add_argument("--image-prefix", default="", metavar="PREFIX", help="goes before the images' names")
    return parser
