"""Where standard error goes, in a process of its own: the log, what libraries write to descriptor 2, closed streams."""

import subprocess
import sys

_LOG_WHILE_DIVERTED = """
import logging, os
from hcpfs.daemon.background import Log
from hcpfs.system.terminal import standard_error_diverted
log = Log().__enter__()
log.begin(None)
with standard_error_diverted() as said:
    os.write(2, b"one\\ntwo\\n")
    logging.getLogger("hcpfs").warning("a note")
    log.__exit__(None, None, None)  # all that waits is written
    print(said())
os.write(2, b"three\\n")
"""

_WITHOUT_STREAMS = """
import os, sys
from hcpfs.system.terminal import prepare
for number in range(3):
    os.close(number)
sys.stdout = sys.stderr = None  # as Python has it where they were closed before
prepare()
print("nobody hears it"), print("nor this", file=sys.stderr)
sys.exit(os.open("/", os.O_RDONLY))
"""


def test_what_is_logged_while_a_library_says_why_it_fails_goes_to_the_log_and_not_into_its_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", _LOG_WHILE_DIVERTED], capture_output=True, text=True, check=True)
    assert done.stdout == "one; two\n"
    first, second = done.stderr.splitlines()
    assert first.endswith(" WARNING hcpfs: a note")
    assert second == "three"


def test_a_file_never_gets_the_number_of_a_closed_standard_stream() -> None:
    assert subprocess.run([sys.executable, "-c", _WITHOUT_STREAMS], check=False).returncode > 2
