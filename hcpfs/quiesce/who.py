"""A helper process that says who uses images, in words.

`python -m hcpfs.quiesce.who MOUNTPOINT INODE...` prints one JSON list of strings.
The kernel asks the daemon for the attributes of a loop device's file. A thread of the daemon that waited for that could
not be killed and would keep /dev/fuse open, so this process asks in its place, as the freezer does (I10).
"""

import json
import sys

from hcpfs.system import beneath, namespaces, users


def words(mountpoint: str, inodes: set[int]) -> list[str]:
    """Each loop device on one of the files, with its users, and each program that has one of the files open."""
    own = [mount for mount in beneath.mounts() if mount.mountpoint == mountpoint]
    ours = [mount for mount in own if mount.filesystem == beneath.FILESYSTEM_TYPE]
    if not ours:
        return []
    device = ours[-1].device
    places = {mount.mountpoint for mount in namespaces.survey().of_device(device)}
    found = [users.loop_words(state) for state, inode in users.loops_of(device, places) if inode in inodes]
    return found + [user.words for user in users.of_file_system(device, inodes)]


if __name__ == "__main__":
    print(json.dumps(words(sys.argv[1], {int(inode) for inode in sys.argv[2:]})))
