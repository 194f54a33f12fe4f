"""Dialogues on disk: a folder of parts, each written whole or not at all, and what they were made with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.service.errors import ConfigError

_SETTINGS = "data.json"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation's tokens, templates included; the target wrote those of `spans`, [begin, end), as an assistant."""

    kind: str
    token_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]


class DialogueFolder:
    """Where `quire speculate data` writes and `train` reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or finds that it was begun with the same `settings`; raises ConfigError if it can't be
        used."""
        file = self.path / _SETTINGS
        try:
            if file.is_file():
                before = json.loads(file.read_text(encoding="utf-8"))
                for name, value in settings.items():
                    if before.get(name) != value:
                        raise ConfigError(
                            f"{self.path} was begun with {name} {before.get(name)!r} and now it is {value!r}: name "
                            "another folder, or go on with the same",
                            field=name,
                        )
                return
            self.path.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} can't be used ({error}): name another folder", field="output") from error

    def has(self, part: int) -> bool:
        """Whether part number `part`, from 0, is there."""
        return self._file(part).is_file()

    def write(self, part: int, dialogues: Iterable[Dialogue]) -> None:
        """Writes part number `part`; raises ConfigError if there is no room."""
        lines = [
            json.dumps({"kind": d.kind, "token_ids": list(d.token_ids), "spans": [list(span) for span in d.spans]})
            for d in dialogues
        ]
        file = self._file(part)
        try:
            unfinished = file.with_suffix(".tmp")
            unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            unfinished.replace(file)
        except OSError as error:
            raise ConfigError(f"{file} can't be written ({error.strerror})", field="output") from error

    def read(self) -> Iterator[Dialogue]:
        """All dialogues in their order; raises ConfigError that names the file that can't be read."""
        parts = self._parts()
        if not parts:
            raise ConfigError(
                f"{self.path} holds no dialogues: make some with `quire speculate data TARGET -o {self.path}`",
                field="data",
            )
        for file in parts:
            try:
                for line in file.read_text(encoding="utf-8").splitlines():
                    read = json.loads(line)
                    yield Dialogue(read["kind"], read["token_ids"], [(begin, end) for begin, end in read["spans"]])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{file} is broken ({error}): delete it and make it again", field="data") from error

    def _file(self, part: int) -> Path:
        return self.path / f"part-{part:05}.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.jsonl"))
