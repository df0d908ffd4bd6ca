"""Work that need not hold up training: a thread of its own, and a queue that is bounded."""

import queue
import threading
import time
import warnings
from collections.abc import Callable

__all__ = ["Desk"]

_LENGTH = 16
_PATIENCE = 5.0


class Desk:
    """Does jobs one after the other in the background.

    A job that fails is reported by a warning, once; training goes on.

    Attributes:
        spent: Seconds of processor time that jobs have taken so far.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_LENGTH)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._warned = False

    def put(self, job: Callable[[], None]) -> None:
        """Hand over a job. Where the queue is full this waits 5 s at most, then the job is lost."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="torchbp.watch", daemon=True)
            self._thread.start()
        try:
            self._jobs.put(job, timeout=_PATIENCE)
        except queue.Full:
            self._failure = self._failure or RuntimeError("its files can't be written fast enough")
        self._report()

    def join(self) -> None:
        """Wait until all jobs are done."""
        if self._thread is not None:
            self._jobs.join()
        self._report()

    def close(self) -> None:
        """Wait until all jobs are done and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._report()

    def _report(self) -> None:
        if self._failure is not None and not self._warned:
            self._warned = True
            message = f"torchbp.watch has lost some of its readings: {self._failure!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            start = time.thread_time()
            try:
                if job is None:
                    return
                job()
            except Exception as error:  # whatever it is, training goes on
                self._failure = self._failure or error
            finally:
                self.spent += time.thread_time() - start
                self._jobs.task_done()
