"""Times of changes: each is later than the one before it, also when the clock was set back.

Backup programs skip a file whose size and times are what they were.
"""

import time

_STEP_NS = 1_000_000_000  # what programs tell apart that compare whole seconds

_ahead_ns = 0  #: what the clock lacks, since it was set back


def after(previous_ns: int) -> int:
    """The time now, in ns since 1970; or where the clock is not beyond `previous_ns`, a later time than that.

    A clock that was set back by a second or more goes on from the old time at its own pace.
    """
    global _ahead_ns
    now = time.time_ns()
    if now > previous_ns:
        return now
    if previous_ns - now < _STEP_NS:
        return previous_ns + 1
    if now + _ahead_ns <= previous_ns:
        _ahead_ns = previous_ns - now + _STEP_NS
    return now + _ahead_ns
