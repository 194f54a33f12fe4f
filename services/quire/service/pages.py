"""Page size and page hashes: the part of the cache that router and engine must compute alike.

The definition stands in protos/quire/v1/request.proto at CacheKey. A page's hash chains over its parent's, so equal
hashes mean equal prefixes, tenant, adapter and images included.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from quire.service.request import CacheKey

PAGE_SIZE = 16
HASH_BYTES = 16

_PAGE_BYTES = PAGE_SIZE * 4
_PERSON = b"quire.page.v1"


def root_hash(key: CacheKey) -> bytes:
    """The parent of a prompt's first page (16 bytes)."""
    salt, adapter = key.salt.encode(), key.adapter.encode()
    parts = (struct.pack("<I", len(salt)), salt, struct.pack("<I", len(adapter)), adapter, *key.image_digests)
    return blake2b(b"".join(parts), digest_size=HASH_BYTES, person=_PERSON).digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full page: `parent` is the page's before it (or the root), `token_ids` its 16 tokens."""
    return blake2b(parent + struct.pack("<16I", *token_ids), digest_size=HASH_BYTES).digest()


def prefix_hashes(key: CacheKey, token_ids: Sequence[int]) -> list[bytes]:
    """The hashes of every full page of `token_ids`, first page first."""
    packed = np.asarray(token_ids, dtype="<u4").tobytes()
    parent = root_hash(key)
    hashes = []
    for start in range(0, len(packed) - _PAGE_BYTES + 1, _PAGE_BYTES):
        parent = blake2b(parent + packed[start : start + _PAGE_BYTES], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes
