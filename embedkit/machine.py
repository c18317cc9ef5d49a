"""What the machine is, and what it has left."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Return the bytes that a process may still take: of the system, and of its container.

    Returns
    -------
    int or None
        None where the system does not say.

    Examples
    --------
    >>> from embedkit.machine import available_memory
    >>> free = available_memory()
    >>> free is None or free > 0
    True
    """
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup", folder)
        try:
            most, taken = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
            facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # No container, or "max".
            continue
        # Files that were read are kept only while nobody needs the room.
        found.append(max(0, most - taken + int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))))
    return min(found) if found else None


def processor_facts() -> dict[str, str]:
    """Return what Linux says of the processor, such as "model name" and "flags"; nothing on other systems.

    Examples
    --------
    >>> from embedkit.machine import processor_facts
    >>> isinstance(processor_facts(), dict)
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
