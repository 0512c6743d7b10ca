"""Times of changes: each is later than the one before it, even if the clock was set back.

Backup programs skip a file whose size and times are what they were.
"""

import time

_STEP_NS = 1_000_000_000  # programs that compare whole seconds see this difference

_ahead_ns = 0  #: how far our times run ahead of the clock, since it was set back


def after(previous_ns: int) -> int:
    """The time now, in ns since 1970; or, if the clock has not passed `previous_ns`, a time later than that.

    After the clock was set back by a second or more, times go on from the old time at the clock's pace.
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
