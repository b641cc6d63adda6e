"""Java programs inside pycocoevalcap: found or explained, and speaking UTF-8."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from vilg.errors import UserError

_OPTIONS = "JAVA_TOOL_OPTIONS"


@contextlib.contextmanager
def needs_java(what: str, *, instead: str) -> Iterator[None]:
    """Around code that starts `java` from pycocoevalcap. Raises UserError if one of them is missing.

    Before Java 18 text is read in the locale's encoding: under LANG=C every Chinese character becomes the same question
    mark, and all Chinese captions of one length agree.
    """
    if shutil.which("java") is None:
        raise UserError(f"{what} needs Java (`java` is not on the PATH); install a JRE, or use {instead}")
    before = os.environ.get(_OPTIONS)
    os.environ[_OPTIONS] = f"{before or ''} -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8".strip()
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {error.name}: pip install pycocoevalcap") from None
    finally:
        if before is None:
            del os.environ[_OPTIONS]
        else:
            os.environ[_OPTIONS] = before
