"""What the processors of this machine have used, from the kernel's powercap tree (RAPL; Intel's name, AMD's too).

    /sys/class/powercap/intel-rapl:0/name                       package-0
                                     energy_uj                  microjoules, wraps round after
                                     max_energy_range_uj        this many
    /sys/class/powercap/intel-rapl:0:0                          its cores: counted in the package already
    /sys/class/powercap/intel-rapl:1  (psys)                    the whole board: holds the packages
    /sys/class/powercap/intel-rapl-mmio:0                       package-0 again, by another road

    packages = Packages()          # NotMeasured where there are none, or where only root may read them
    packages.joules()              # 41.7: all packages since the first call, other programs' share included

Source: Linux, Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class NotMeasured(Exception):
    """Energy cannot be read here; the message says why, and what would help."""


class Packages:
    """The energy counters of all processor packages. Read more often than they wrap: minutes apart at most."""

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        self._zones = [zone for zone in zones if _name(zone).startswith("package")]
        if not self._zones:
            raise NotMeasured(
                f"{root} shows no processor package (RAPL): virtual machines and containers often hide it"
            )
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in self._zones]
        self._before = self._read()
        self._total = 0

    def __len__(self) -> int:
        return len(self._zones)

    def joules(self) -> float:
        """Used by all packages since this object was made."""
        now = self._read()
        for before, after, span in zip(self._before, now, self._ranges, strict=True):
            self._total += after - before if after >= before else after - before + span
        self._before = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [_microjoules(zone / "energy_uj") for zone in self._zones]


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _microjoules(file: Path) -> int:
    try:
        return int(file.read_text())
    except PermissionError:
        raise NotMeasured(
            f"{file} may be read by root alone (as kernels since 5.10 have it): `sudo chmod a+r {file.parent}/*_uj` "
            "opens it until the next start of the machine"
        ) from None
    except (OSError, ValueError) as error:
        raise NotMeasured(f"{file} cannot be read: {error}") from None
