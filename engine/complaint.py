"""Output that ends nothing: a full disk, a reader that is gone (`| head`, a killed tee) or a locale without a letter
costs a line, never a run.

keep_output_open()                                   # once, at the start of a command
complain("error: rank 0 ends, a rank is lost")       # on stderr
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)  # of a pipe's reader, a terminal, a socket: none of them comes back


def complain(words: str) -> None:
    """Prints them at once, if that can be. What comes next matters more: an exit code, a restart."""
    with suppress(OSError, ValueError):  # ValueError: a closed stream, or letters that it cannot encode
        print(words, file=sys.stderr, flush=True)


def keep_output_open() -> None:
    """From now on nothing that is printed by this process raises. Streams that were replaced, as tests do, stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with the stream closed (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process is)
        elif stream is getattr(sys, f"__{name}__"):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, LossyStream(stream))


class LossyStream:
    """A text stream whose write errors are lost text. Once its reader is gone, all goes to /dev/null: what libraries
    write past Python does too, and the flush at the end of the process, which would change its exit code."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Gives the length of the text, whatever became of it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As `write`, line by line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Writes what is buffered, if that can be."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            if error.errno in _GONE:
                with suppress(OSError, ValueError):
                    self._discard()
        except ValueError:  # closed
            pass

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
