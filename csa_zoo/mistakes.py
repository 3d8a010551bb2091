"""Mistakes that a user can mend, said in one line instead of a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told_in_a_line(program: str) -> Iterator[None]:
    """End the program with the message of an error that the user can mend, and status 1.

    These are the errors that the package raises itself, with the file, the value and the remedy: files, values, missing
    packages, diverged training. Any other is a defect and keeps its traceback.

    Args:
        program: Name that the line begins with.

    Raises:
        SystemExit: Instead of such an error; with 130 if the user interrupts.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        print(f'{program}: {error}', file=sys.stderr)
        sys.exit(1)


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Name the option whose value was passed on as keyword arguments, where a function has no such argument.

    Raises:
        ValueError: Instead of a TypeError.
    """
    try:
        yield
    except TypeError as error:
        raise ValueError(f'{option}: {error}') from error
