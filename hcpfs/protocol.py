"""The few messages of the kernel's FUSE protocol that are answered without libfuse.

The layouts are those of include/uapi/linux/fuse.h and are the same since protocol 7.9, of 2007; what came later went
into their padding. Numbers are in the machine's own byte order.
"""

import struct
from enum import IntEnum


class Opcode(IntEnum):
    """What the kernel asks for; only what is dealt with here."""

    FORGET = 2
    READ = 15
    WRITE = 16
    FSYNC = 20
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42


#: of fuse_in_header its length, opcode and unique number, then what fuse_read_in and fuse_write_in have in common: the
#: file's handle, an offset and a size. fuse_fsync_in begins with the handle, too.
REQUEST = struct.Struct("=IIQ24xQQI")
DATA_AT = 80  #: where in a WRITE request its data begins: after fuse_in_header and fuse_write_in

#: fuse_out_header: its length with what follows, a negative errno or 0, the request's unique number.
ANSWER = struct.Struct("=IiQ")
WRITTEN = struct.Struct("=IiQII")  #: the whole answer to a WRITE: fuse_write_out has the bytes taken, and padding

MOST_DATA_BYTES = 1 << 20  #: of one READ or WRITE
MOST_REQUEST_BYTES = DATA_AT + MOST_DATA_BYTES + 4096  #: more than any has; too small a buffer the kernel refuses
_MAX_WRITE = struct.Struct("=I")
_MAX_WRITE_AT = ANSWER.size + 20  # in the answer to INIT: of fuse_init_out


def limit_writes(answer: bytearray | memoryview) -> None:
    """Have the kernel send no more than `MOST_DATA_BYTES` in a request; `answer` is libfuse's to INIT."""
    if len(answer) > _MAX_WRITE_AT:  # it is no error
        (allowed,) = _MAX_WRITE.unpack_from(answer, _MAX_WRITE_AT)
        _MAX_WRITE.pack_into(answer, _MAX_WRITE_AT, min(allowed, MOST_DATA_BYTES))
