"""What an installation needs, checked before it starts: `python vilg/tools/setup_checks.py`.

Run by the Makefile with the system's Python, so it uses the standard library only and syntax that old Pythons read.
"""

import os
import shutil
import sys

OLDEST_PYTHON = (3, 10)
GIB = 2**30
NEEDED_GIB = 3.0  # measured: 1.9 GiB with the CPU build of torch, and what pip unpacks on the way
NEEDED_GIB_CUDA = 9.0  # 4.9 GiB with the CUDA build, and as much again for pip's downloads


def problems(folder):
    """Everything that would make the installation into `folder` fail, as sentences that say what to do."""
    found = []
    if sys.version_info < OLDEST_PYTHON:
        found.append(
            "Python {}.{} is too old ({}); install Python 3.10 or newer, or name one: "
            "make PYTHON=/path/to/python3.12".format(sys.version_info[0], sys.version_info[1], sys.executable)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        found.append(
            "this Python cannot make virtual environments ({}); "
            "on Debian and Ubuntu: apt install python3-venv".format(error)
        )
    if not compiler():
        found.append(
            "no C++ compiler found (c++, g++ or clang++); DeepSpeed and Triton compile small parts. On Debian and "
            "Ubuntu: apt install g++; or set CXX"
        )
    free = shutil.disk_usage(folder).free / GIB
    needed = NEEDED_GIB_CUDA if shutil.which("nvidia-smi") else NEEDED_GIB
    if free < needed and not os.path.exists(os.path.join(folder, ".venv", ".installed")):
        found.append(
            "{:.1f} GiB free in {}, but the installation takes about {:.0f} GiB; make room, or clone to another "
            "disk".format(free, folder, needed)
        )
    return found


def compiler():
    """Path of the C++ compiler, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def main():
    """Print all problems; the exit code is 1 if there are any."""
    found = problems(os.getcwd())
    for problem in found:
        sys.stderr.write("setup: {}\n".format(problem))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
