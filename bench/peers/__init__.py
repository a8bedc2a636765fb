"""Peers that the benchmarks compare with, one process each, and the memory of such a process."""

import threading
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak resident memory of this process in MB: since the last `restart`, and since its start.

    Linux keeps it and can start over (a 5 written to clear_refs, which also resets what getrusage tells). Elsewhere, or
    where that is not allowed, the resident size is looked at 100 times a second, which can miss a short peak.
    """

    def __init__(self) -> None:
        self._sampled = 0.0
        self._before = 0.0
        try:
            self._before = self._high_water_mb()
            _CLEAR.write_text("5")
            self.method = "VmHWM"
        except OSError:
            self.method = "sampled"
            threading.Thread(target=self._watch, daemon=True).start()

    def restart(self) -> None:
        """Start over; what is resident now is the least the next peak can be."""
        self._before = self.process_peak_mb()
        if self.method == "VmHWM":
            _CLEAR.write_text("5")
        self._sampled = 0.0

    def peak_mb(self) -> float:
        """Peak since the last restart."""
        return round(self._high_water_mb() if self.method == "VmHWM" else self._sampled, 1)

    def process_peak_mb(self) -> float:
        """Peak since the process started."""
        return max(self._before, self.peak_mb())

    @staticmethod
    def _high_water_mb() -> float:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self._sampled = max(self._sampled, process.memory_info().rss / 2**20)
            time.sleep(0.01)
