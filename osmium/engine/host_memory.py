"""Available host memory, by the system and by the limits of cgroups."""

from pathlib import Path

import psutil

__all__ = ["available_ram"]


def available_ram(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int]:
    """(available, total) bytes of host memory, by the system and by cgroup limits."""
    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    for folder in _memory_cgroups(cgroups, own):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _integer(folder / limit_name), _integer(folder / used_name)
            if limit is not None and used is not None and limit < total:
                # Cached file pages count as used, but the kernel reclaims them.
                available = min(available, max(0, limit - used + _cached(folder / "memory.stat")))
                total = limit
    return min(available, total), total


def _memory_cgroups(cgroups: Path, own: Path) -> list[Path]:
    """The cgroup folders whose memory limits apply to this process: its own and all parents.

    Inside a container its own path may not exist; the top folder is then the container's.
    """
    folders = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        inside = top / path.lstrip("/")
        folders += [one for one in (inside, *inside.parents) if one.is_relative_to(top)]
    return folders or [cgroups, cgroups / "memory"]


def _cached(stat: Path) -> int:
    """Bytes of reclaimable file pages of a cgroup; version 1 has the sum under total_."""
    values = dict(line.split(maxsplit=1) for line in _text(stat).splitlines())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _integer(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
