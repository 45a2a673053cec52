"""The one exception of this repository that a user is meant to see, and what else becomes one."""

import csv
import warnings
import zipfile
import zlib
from contextlib import contextmanager

DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError,
          StopIteration, TypeError, ValueError, csv.Error, zipfile.BadZipFile, zlib.error)


class UserError(Exception):
    """Bad input: one line that says what was given, what was wanted and what to type."""


@contextmanager
def reading(given, script):
    """Around what reads and draws files of `script`: what other files or junk in them do to it
    becomes a UserError, and numpy and matplotlib do not warn of NaN or of missing glyphs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DAMAGE as error:
        raise UserError(f"{given}: other files than those of {script}, or damaged ones "
                        f"({type(error).__name__}: {str(error)[:100]}); wanted a folder that it "
                        "wrote") from error
