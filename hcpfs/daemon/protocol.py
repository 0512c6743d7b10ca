"""The few messages of the kernel's FUSE protocol that are answered without libfuse.

The layouts are those of include/uapi/linux/fuse.h, unchanged since protocol 7.9 of 2007; later additions use their
padding. Numbers are in the machine's byte order.
"""

import struct
from enum import IntEnum


class Opcode(IntEnum):
    """The kinds of requests; only those that are handled here."""

    FORGET = 2
    READ = 15
    WRITE = 16
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42


#: Of fuse_in_header: length, opcode and unique number. Then what fuse_read_in and fuse_write_in have in common: the
#: file's handle, offset and size, and the flags of a WRITE. fuse_fsync_in and fuse_flush_in begin with the handle, too.
REQUEST = struct.Struct("=IIQ24xQQII")
FROM_CACHE = 1  #: FUSE_WRITE_CACHE, of a WRITE: a mapped page is written back; its handle is any that may write
DATA_AT = 80  #: where the data of a WRITE request begins: after fuse_in_header and fuse_write_in

#: fuse_out_header: length of the whole message, a negative errno or 0, the request's unique number.
ANSWER = struct.Struct("=IiQ")
WRITTEN = struct.Struct(
    "=IiQII"
)  #: the answer to a WRITE: with fuse_write_out, which has the number of bytes written, and padding

MOST_DATA_BYTES = 1 << 20  #: of one READ or WRITE
MOST_REQUEST_BYTES = (
    DATA_AT + MOST_DATA_BYTES + 4096
)  #: more than any has, because the kernel refuses a buffer that is too small
_U32 = struct.Struct("=I")
_FLAGS_AT = ANSWER.size + 12  # in the answer to INIT: of fuse_init_out
_MAX_WRITE_AT = ANSWER.size + 20
_ATOMIC_O_TRUNC = 1 << 3

#: fuse_out_header of a notification, with its code, and fuse_notify_inval_inode_out: inode, offset, length
FORGET_CACHED = struct.Struct("=IiQQqq")
FORGET_CACHED_CODE = 2


def change_init(answer: bytearray | memoryview) -> None:
    """Change libfuse's answer to INIT: at most `MOST_DATA_BYTES` in a request, and O_TRUNC as a truncation.

    The kernel sends that truncation after the open. Otherwise it would take the file to be empty for a moment, and
    others that have it open (a loop device) would read zeroes.
    """
    if len(answer) > _MAX_WRITE_AT:  # else it is an error
        (flags,) = _U32.unpack_from(answer, _FLAGS_AT)
        _U32.pack_into(answer, _FLAGS_AT, flags & ~_ATOMIC_O_TRUNC)
        (allowed,) = _U32.unpack_from(answer, _MAX_WRITE_AT)
        _U32.pack_into(answer, _MAX_WRITE_AT, min(allowed, MOST_DATA_BYTES))
