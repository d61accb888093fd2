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

    def __init__(self, measure: Callable[[], float], say: Callable[[str], None]):
        """Measure the peak.

        Args:
            measure: Measures the tokens per second at an MFU of 1.
            say: Receives a line where measuring again changes it.
        """
        self.peak, self.measure, self.say = measure(), measure, say

    def of(self, tokens_per_second: float) -> float:
        """Divide by the peak, which is measured again where the share is above 1: something else ran at that time."""
        share = tokens_per_second / self.peak
        if share > 1:
            with suppress(torch.OutOfMemoryError):
                found = self.measure()
                if found > self.peak:
                    self.say(
                        f"MFU {share:.0%}: the rate of matrix products was measured too low, while something else ran; "
                        f"measured again, it is {found / self.peak:.2f} times as high"
                    )
                    self.peak = found
        return tokens_per_second / self.peak
