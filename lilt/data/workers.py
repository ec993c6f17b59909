"""Data workers that leave Ctrl-C and preemption to the main process, and never outlive it."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from typing import Any

from torch.utils.data import DataLoader, Dataset


def make_loader(dataset: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """Return a data loader with so many worker processes; options are those of torch's."""
    if workers:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    return DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, **options)


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process of a group, to the main process; for data workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    # at its end Python sends its children SIGTERM and waits for them: for ever, where they ignore it
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
