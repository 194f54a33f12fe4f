"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that can be allocated without swapping: the machine's, or the container's if it may have less.

    None where the system does not say (anything but Linux).
    """
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    limits = [kilobytes["MemAvailable"] * 1024]
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            used = int((cgroup / "memory.current").read_text())
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            # Cached file pages count as used, but the kernel drops them for whoever needs memory.
            limits.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    except OSError:
        pass  # no cgroup v2, or not in a container
    return max(0, min(limits))
