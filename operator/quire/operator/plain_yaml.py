"""YAML for people: keys in the order that they were made in, and nothing said by reference."""

from __future__ import annotations

import yaml


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice, without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def dump(document: object) -> str:
    """`document`, plain data, as YAML."""
    text: str = yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, width=120)
    return text
