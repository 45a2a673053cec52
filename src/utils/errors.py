"""The one exception that users are meant to see, and what else is turned into one."""

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
    """For code that reads and draws files of `script`: errors caused by other or damaged files
    become a UserError, and numpy and matplotlib do not warn about NaN or missing glyphs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DAMAGE as error:
        raise UserError(f"{given}: files not written by {script}, or damaged ones "
                        f"({type(error).__name__}: {str(error)[:100]}); wanted a folder that it "
                        "wrote") from error
