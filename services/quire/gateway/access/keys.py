"""The file of API keys: one JSON object a line, each with a key's hash, its tenant and its limits.

    {"hash": "sha256:…", "tenant": "acme", "requests_per_minute": 600, "models": ["llama"]}

Keys never lie on a disk of ours. SHA-256 without a salt and without stretching is enough for them, and would not be for
passwords: `new_key` draws 256 random bits, which no dictionary holds and nobody can try out, and a hash without a salt
can be looked up. The scheme is part of each hash, so that another can be added beside it. `quire keys` makes the lines.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from quire.service.errors import ConfigError

_PREFIX = "quire-"
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
# It is a metrics' label and a part of page hashes.
_TENANT = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class KeyLine(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A line of the file. A limit that is left out is none, except `max_priority`: nobody overtakes others unasked.

    requests_per_minute, tokens_per_minute: may be used in one burst; tokens are those of prompts and outputs.
    concurrency: requests in flight. models: names the key may ask for. expires: with an offset from UTC.
    """

    hash: str
    tenant: str
    name: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    models: list[str] | None = None
    expires: datetime | None = None
    max_priority: int = 0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What the holder of a key may do; `digest` is the SHA-256 of the key. See KeyLine."""

    digest: bytes
    tenant: str
    name: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    models: frozenset[str] | None = None
    expires: datetime | None = None
    max_priority: int = 0

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires


class KeyRing:
    """The keys of one version of the file."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.digest: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        """The key that `secret` is, or None.

        The time that it takes depends on the hash of what was sent, which tells a guesser nothing of the hashes here.
        """
        digest = digest_of(secret)
        key = self._keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None


def new_key() -> str:
    """A key that nobody else has: 256 random bits, in 49 characters."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """The hash by which a key is known, 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def line_for(line: KeyLine) -> str:
    """`line` as it stands in the file. Raises ConfigError if it could not be read back."""
    text = msgspec.json.encode(line).decode()
    _parse_line(text, "the key")
    return text


def load_keys(path: str) -> KeyRing:
    """Reads the file at `path`; empty lines and those that begin with # count nothing. Raises ConfigError."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys: can't read {path}: {error}", field="api_keys") from error
    keys: dict[bytes, ApiKey] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _parse_line(line, f"--api-keys: {path}, line {number}")
        if key.digest in keys:
            raise ConfigError(f"--api-keys: {path}, line {number}: the hash is there twice: remove one line")
        keys[key.digest] = key
    return KeyRing(keys.values())


def _parse_line(text: str, where: str) -> ApiKey:
    try:
        line = msgspec.json.decode(text, type=KeyLine)
    except (msgspec.DecodeError, RecursionError) as error:
        # Never the line itself: somebody may have put a key there.
        raise ConfigError(f"{where}: {error}: `quire keys` prints such lines", field="api_keys") from error
    problem = _problem(line)
    if problem:
        raise ConfigError(f"{where}: {problem}", field="api_keys")
    return ApiKey(
        digest=bytes.fromhex(line.hash.removeprefix("sha256:")),
        tenant=line.tenant,
        name=line.name,
        requests_per_minute=line.requests_per_minute,
        tokens_per_minute=line.tokens_per_minute,
        concurrency=line.concurrency,
        models=None if line.models is None else frozenset(line.models),
        expires=line.expires,
        max_priority=line.max_priority,
    )


def _problem(line: KeyLine) -> str:
    if not _HASH.fullmatch(line.hash):
        return "hash must be sha256: and 64 hexadecimal digits, never the key itself: `quire keys` prints it"
    if not _TENANT.fullmatch(line.tenant):
        return f"tenant is {line.tenant[:80]!r}: use 1 to 64 letters, digits and the characters . _ @ -"
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        value = getattr(line, name)
        if value is not None and not 1 <= value <= 2**31 - 1:
            return f"{name} is {value}: it must be at least 1; leave it out for no limit"
    if line.models is not None and not line.models:
        return "models is empty: name one, or leave it out to allow all"
    if line.expires is not None and line.expires.tzinfo is None:
        return f"expires is {line.expires.isoformat()}: add the offset from UTC, such as Z"
    if not -(2**31) <= line.max_priority < 2**31:
        return f"max_priority is {line.max_priority}: it must fit 32 bits"
    return ""
