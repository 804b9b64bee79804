"""What the benchmarks of training measure with: time, peak memory, and processes of their own."""

import ctypes
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 1 << 20
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Worker:
    """An object in a process of its own, whose methods are called from here.

    It is forked where there is no GPU, so that it need not import what is imported already. Whoever
    makes one may not have computed with torch: threads of OpenMP do not survive a fork. Contexts of
    CUDA do not either, and importing makes them: beside a GPU it is spawned.

    Args:
        make: makes the object, in the new process.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, args), daemon=True)
        self._process.start()
        other.close()
        self.answer()

    def call(self, method: str, *args: Any) -> Any:
        """What the method returns. Raises RuntimeError, with its traceback, when it fails."""
        self.ask(method, *args)
        return self.answer()

    def ask(self, method: str, *args: Any) -> None:
        """Begins a call, so that several workers can be at it together."""
        self._pipe.send((method, args))

    def answer(self) -> Any:
        """What the call that was begun returns; raises as `call` does."""
        failed, answer = self._pipe.recv()
        if failed:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple) -> None:
    try:
        worker = make(*args)
        pipe.send((False, None))
        while (asked := pipe.recv()) is not None:
            method, given = asked
            pipe.send((False, getattr(worker, method)(*given)))
    except Exception:
        pipe.send((True, traceback.format_exc()))


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds that `step` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def peak_of(step: Callable[[], Any], device: torch.device) -> float:
    """Megabytes that `step` needs at its peak, above those that are in use when it begins.

    On a CPU (Linux) this is the resident memory of the process, so run it in one of its own.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    libc = ctypes.CDLL(None)
    # Tensors from pages of their own: else the holes of malloc's heap would be most of the peak.
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    step()
    peak = resident("VmHWM")
    # Where malloc's own adjustment ends: pages are kept from here on, and not cleared anew.
    libc.mallopt(MMAP_THRESHOLD, 32 * MEGABYTE)
    libc.mallopt(TRIM_THRESHOLD, 64 * MEGABYTE)
    return (peak - before) / MEGABYTE


def resident(name: str) -> int:
    """Bytes of this process: `VmRSS`, `RssAnon` without mapped files, or `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) * 1024
