"""Print to stderr and stdout, ignoring write errors.

Errors such as a full disk, a closed pipe (`| head`, a killed tee), a locale without a letter.

    ignore_output_errors()                               # once, at the start of a command
    print_error("error: rank 0 ends, a rank is lost")    # on stderr
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# The reader of a pipe, the terminal or the socket has gone for good.
_READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


def print_error(message: str) -> None:
    """Print to stderr, flushed, ignoring write errors: what follows (an exit code, a restart) matters more."""
    with suppress(OSError, ValueError):  # ValueError: a closed stream, or letters that it cannot encode
        print(message, file=sys.stderr, flush=True)


def ignore_output_errors() -> None:
    """Make stdout and stderr of this process ignore write errors. Streams that are already replaced (tests) stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with the stream closed (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process is)
        elif stream is getattr(sys, f"__{name}__"):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, ErrorIgnoringStream(stream))


class ErrorIgnoringStream:
    """Text stream that drops what cannot be written.

    Once the reader has gone, the file descriptor is redirected to /dev/null. So writes of C libraries, and the flush at
    the end of the process, which would change its exit code, do not fail either.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` if possible; return its length in any case."""
        self._ignoring_errors(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line if possible."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered if possible."""
        self._ignoring_errors(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _ignoring_errors(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            if error.errno in _READER_GONE:
                with suppress(OSError, ValueError):
                    self._redirect_to_null()
        except ValueError:  # closed
            pass

    def _redirect_to_null(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
