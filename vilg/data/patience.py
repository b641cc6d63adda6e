"""Reads that stall: reported, tried again, and in the end an error; never a hang.

A read of a network file system that does not answer cannot be interrupted, so a step is built in a thread of its own. When no
sample has arrived for the allowed time the thread is given up and another one, with files opened anew, starts over: building a
step is a pure function, so nothing is lost. The allowed time doubles with every attempt.
"""

import copy
import queue
import sys
import threading
import time

from vilg.data.steps import StepBuilder, StepData
from vilg.errors import TRY_AGAIN

ATTEMPTS = 4


class PatientBuilder:
    """Calls a `StepBuilder`. timeout: seconds without a sample before a step is built anew; 0 waits for ever."""

    def __init__(self, builder: StepBuilder, timeout: float):
        self.builder, self.timeout = builder, timeout

    def __call__(self, first: int) -> StepData:
        """The step that begins at global index `first`; its `failure` names the shard if no attempt could read it."""
        if self.timeout == 0:
            return self.builder(first)
        for attempt in range(ATTEMPTS):
            allowed = self.timeout * 2**attempt
            data = self._attempt(first, allowed)
            if data is not None:
                return data
            where = self.builder.reading_from()
            left = ATTEMPTS - attempt - 1
            if left:
                print(
                    f"note: {where} has not answered for {allowed:.3g} s; reading again ({left} attempt"
                    f"{'s' if left > 1 else ''} left)",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                self.builder = copy.deepcopy(self.builder)  # no file stays open in common
        waited = self.timeout * (2**ATTEMPTS - 1)
        failure = (
            f"{where} could not be read: {ATTEMPTS} attempts in {waited:.3g} s without an answer. Look at the file system or "
            "the link to it; data.read_timeout says how long a read may take"
        )
        return StepData([], 0, [], failure=failure, exit_code=TRY_AGAIN)

    def _attempt(self, first: int, allowed: float) -> StepData | None:
        """The step, or None when no sample arrived for `allowed` seconds."""
        builder, outcome = self.builder, queue.SimpleQueue()
        builder.last_sample = time.monotonic()

        def build() -> None:
            try:
                outcome.put((builder(first), None))
            except BaseException as error:  # raised by the caller's thread
                outcome.put((None, error))

        threading.Thread(target=build, name=f"step at {first}", daemon=True).start()
        while True:
            try:
                data, error = outcome.get(timeout=max(0.01, builder.last_sample + allowed - time.monotonic()))
            except queue.Empty:
                if time.monotonic() - builder.last_sample >= allowed:
                    return None
                continue
            if error is not None:
                raise error
            return data
