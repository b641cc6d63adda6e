"""Folders that stand under their name whole or not at all, also where one takes the place of another.

Linux exchanges two names in one step (renameat2). Where the file system cannot, the old folder is put aside under a
hidden name and the new one takes its own; a crash between these two leaves no folder under the name, and the one aside,
still whole, counts as it (`standing`) and gets its name back (`put_back`).
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

# Hidden names beside a folder: what is being written, what a newer one takes the place of, what is being deleted.
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # the kernel or the file system


def hidden(final: Path, suffix: str) -> Path:
    """The hidden name beside `final` for one of the suffixes above."""
    return final.with_name(f".{final.name}{suffix}")


def put_in_place(new: Path, final: Path) -> None:
    """Give the folder `new` the name `final`; a folder that stands there is deleted once it is replaced.

    A crash leaves one of the two whole for `standing`. Raises OSError, and the old folder is then back in its place.
    """
    old = None
    if not final.exists():
        os.rename(new, final)
    elif exchange(new, final):
        old = new
    else:
        old = hidden(final, REPLACED)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        try:
            os.rename(new, final)
        except OSError:
            os.rename(old, final)
            raise
    flush_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def standing(final: Path) -> Path:
    """Where the folder `final` is: put aside if a crash came between the two renames of a replacement."""
    aside = hidden(final, REPLACED)
    return aside if aside.is_dir() and not final.exists() else final


def put_back(final: Path) -> bool:
    """Give a folder that a crash left aside its name back; whether there was one. Raises OSError."""
    found = standing(final)
    if found == final:
        return False
    os.rename(found, final)
    flush_folder(final.parent)
    return True


def exchange(first: Path, second: Path) -> bool:
    """Give each of two folders the other's name in one step; False, and nothing done, where that is not to be had.

    Raises OSError for any other failure.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut, where the file system can. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
