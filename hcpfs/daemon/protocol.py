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
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42


#: of fuse_in_header its length, opcode and unique number, then what fuse_read_in and fuse_write_in have in common: the
#: file's handle, an offset and a size, and then the flags of a WRITE. fuse_fsync_in and fuse_flush_in begin with the
#: handle, too.
REQUEST = struct.Struct("=IIQ24xQQII")
FROM_CACHE = 1  #: FUSE_WRITE_CACHE, of a WRITE: a page that was mapped; the handle is that of anybody who may write
DATA_AT = 80  #: where in a WRITE request its data begins: after fuse_in_header and fuse_write_in

#: fuse_out_header: its length with what follows, a negative errno or 0, the request's unique number.
ANSWER = struct.Struct("=IiQ")
WRITTEN = struct.Struct("=IiQII")  #: the whole answer to a WRITE: fuse_write_out has the bytes taken, and padding

MOST_DATA_BYTES = 1 << 20  #: of one READ or WRITE
MOST_REQUEST_BYTES = DATA_AT + MOST_DATA_BYTES + 4096  #: more than any has; too small a buffer the kernel refuses
_U32 = struct.Struct("=I")
_FLAGS_AT = ANSWER.size + 12  # in the answer to INIT: of fuse_init_out
_MAX_WRITE_AT = ANSWER.size + 20
_ATOMIC_O_TRUNC = 1 << 3

#: fuse_out_header of a message that is no answer, with a code, and fuse_notify_inval_inode_out: inode, offset, length
FORGET_CACHED = struct.Struct("=IiQQqq")
FORGET_CACHED_CODE = 2


def change_init(answer: bytearray | memoryview) -> None:
    """Have the kernel send no more than `MOST_DATA_BYTES` in a request; `answer` is libfuse's to INIT.

    And have it ask for O_TRUNC as for a truncation, after the open. Else it would hold the file to be empty for a
    moment, and others who have it open (a loop device) would read zeroes then.
    """
    if len(answer) > _MAX_WRITE_AT:  # it is no error
        (flags,) = _U32.unpack_from(answer, _FLAGS_AT)
        _U32.pack_into(answer, _FLAGS_AT, flags & ~_ATOMIC_O_TRUNC)
        (allowed,) = _U32.unpack_from(answer, _MAX_WRITE_AT)
        _U32.pack_into(answer, _MAX_WRITE_AT, min(allowed, MOST_DATA_BYTES))
