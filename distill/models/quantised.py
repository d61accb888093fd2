"""Import bitsandbytes, which reads and steps tensors of 8 bits."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys


def import_bitsandbytes() -> bool:
    """Import bitsandbytes where it is installed, and tell whether it is; others that import it later get the same.

    On some CPUs it would fetch compiled code from the hub by the package `kernels` while it is imported, and it tells
    where it could not. It finds no such package here.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    if "bitsandbytes" not in sys.modules:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        before = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own sign for a module that is not there
        try:
            importlib.import_module("bitsandbytes")
        finally:
            del sys.modules["kernels"]
            if before is not None:
                sys.modules["kernels"] = before
    return True
