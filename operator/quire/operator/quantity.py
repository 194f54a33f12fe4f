"""Kubernetes' quantities: 500m, 2, 16Gi."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_FORM = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_UNITS = {
    None: Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "P": Decimal(10**15), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30),
    "Ti": Decimal(2**40), "Pi": Decimal(2**50),
}  # fmt: skip


def quantity(value: object) -> Decimal | None:
    """What `value` stands for, exactly; None if it is no quantity."""
    match = _FORM.fullmatch(str(value))
    return Decimal(match[1]) * _UNITS[match[2]] if match else None


def whole_bytes(value: str) -> int:
    """A quantity of bytes, rounded up. Raises ValueError if it is none."""
    amount = quantity(value)
    if amount is None:
        raise ValueError(f"{value!r} is not a quantity: write a number with a unit, such as 8Gi")
    return int(amount.to_integral_value(rounding=ROUND_CEILING))
