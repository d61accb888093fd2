"""Seconds of training, and the utilisation that they amount to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


class Stopwatch:
    """Seconds that steps take, those of evaluations and saves left out."""

    def __init__(self, device: torch.device):
        self.device, self.since, self.last = device, time.monotonic(), 0.0
        self.saving = 0.0
        """Seconds that training stood still for saves since the last record."""

    def lap(self) -> float:
        """Return the seconds since the last call."""
        now = time.monotonic()
        seconds, self.since = now - self.since, now
        return max(seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time what is no step, from when the device has done all steps before it; `last` has the seconds."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        before = time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic() - before
            self.since += self.last


class Utilisation:
    """Model FLOPs utilisation (MFU): tokens per second as a share of what matrix products alone would allow."""

    def __init__(self, peak: float | None, measure: Callable[[], float] | None, say: Callable[[str], None]):
        """Start with a measured peak.

        Args:
            peak: Tokens per second at an MFU of 1; None: not known, and neither is the MFU.
            measure: Measures it again.
            say: Receives a line where that changes it.
        """
        self.peak, self.measure, self.say = peak, measure, say

    def of(self, tokens_per_second: float) -> float | None:
        """Divide by the peak, which is measured again where the share is above 1: something else ran at that time."""
        if self.peak is None:
            return None
        share = tokens_per_second / self.peak
        if share > 1 and self.measure is not None:
            with suppress(torch.OutOfMemoryError):
                found = self.measure()
                if found > self.peak:
                    self.say(
                        f"MFU {share:.0%}: the rate of matrix products was measured too low, while something else ran; "
                        f"measured again, it is {found / self.peak:.2f} times as high"
                    )
                    self.peak = found
        return tokens_per_second / self.peak
