"""Reads that stall or fail: reported, tried again, and in the end an error; never a hang.

A read of a network file system that does not answer cannot be interrupted, so a step is built in a thread of its own. When no
sample has arrived for the allowed time the thread is given up and another one, with files opened anew, starts over: building a
step is a pure function, so nothing is lost. The allowed time doubles with every attempt. A read that fails (an input error, a
stale handle, a store that is away) is an attempt too.
"""

import copy
import queue
import sys
import threading
import time
from dataclasses import replace

from vilg.data.steps import StepBuilder, StepData
from vilg.errors import TRY_AGAIN

ATTEMPTS = 4
PAUSES = (0.5, 2.0, 8.0)  # seconds between them


class PatientBuilder:
    """Calls a `StepBuilder`. timeout: seconds without a sample before a step is built anew; 0 waits for ever."""

    def __init__(self, builder: StepBuilder, timeout: float):
        self.builder, self.timeout = builder, timeout

    def __call__(self, first: int) -> StepData:
        """The step that begins at global index `first`; its `failure` names the shard if no attempt could read it."""
        for attempt in range(ATTEMPTS):
            data = self._attempt(first, self.timeout * 2**attempt)
            if data.exit_code != TRY_AGAIN:
                return data
            if left := ATTEMPTS - attempt - 1:
                plural = "s" if left > 1 else ""
                print(f"note: {data.failure}; reading again ({left} attempt{plural} left)", file=sys.stderr, flush=True)
                time.sleep(PAUSES[attempt])
                self.builder = copy.deepcopy(self.builder)  # no file stays open in common
        failure = f"{data.failure}; all {ATTEMPTS} attempts failed. Look at the file system or the link to it"
        return replace(data, failure=failure)

    def _attempt(self, first: int, allowed: float) -> StepData:
        """The step, or one without arrays whose exit code TRY_AGAIN says that it may be read another time: a read failed, or
        no sample arrived for `allowed` seconds (0: without end)."""
        if allowed == 0:
            return _built(self.builder, first)
        builder, outcome = self.builder, queue.SimpleQueue()
        builder.last_sample = time.monotonic()

        def build() -> None:
            try:
                outcome.put((_built(builder, first), None))
            except BaseException as error:  # raised by the caller's thread
                outcome.put((None, error))

        threading.Thread(target=build, name=f"step at {first}", daemon=True).start()
        while True:
            try:
                data, error = outcome.get(timeout=max(0.01, builder.last_sample + allowed - time.monotonic()))
            except queue.Empty:
                if time.monotonic() - builder.last_sample >= allowed:
                    where = builder.reading_from()
                    return _failed(f"{where} has not answered for {allowed:.3g} s (data.read_timeout={self.timeout:.3g})")
                continue
            if error is not None:
                raise error
            return data


def _built(builder: StepBuilder, first: int) -> StepData:
    try:
        return builder(first)
    except OSError as error:
        return _failed(f"{builder.reading_from()} could not be read: {error.strerror or error}")


def _failed(what: str) -> StepData:
    return StepData([], 0, [], failure=what, exit_code=TRY_AGAIN)
