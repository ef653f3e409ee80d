"""Errors of users: one plain message and exit status 2, without a traceback."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXIT_CODE = 2
INTERRUPTED = 128 + 2  # the exit status of a process that SIGINT has ended, as shells report it
TERMINATED = 128 + 15  # likewise by SIGTERM

# Lines in which jsonargparse reports its search through type unions and dumps the whole value. They hide the one line
# about the misspelt or refused key.
_NOISE = re.compile(
    r"^(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Expected a <class 'NoneType'>"
    r"|Expected a path but .* either not accessible or invalid|Given value type: .*|Given value: .*"
    r"|Not a valid subclass of \w+|Subclass types expect one of:|a class path \(str\)|a dict with(out)? .*)$"
)
_GIVEN = "Given value: "
_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":$')
_TYPE = re.compile(
    r"Expected a (?:<class '(?P<type>[\w.]+)'>|typing\.Literal\[(?P<values>.*?)\]|dot import path string: .*)"
    r"(?:\. Got value: (?P<found>.*))?$"
)


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, which unlike Ctrl-C reaches one process alone; what cleans up after Ctrl-C does so for this, too."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM raise `TerminatedError` inside the block, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return

    def stop(*_: object) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that Ctrl-C or SIGTERM has stopped."""
    return TERMINATED if isinstance(stop, TerminatedError) else INTERRUPTED


def run_plainly(dispatch: Callable[[list[str]], None]) -> None:
    """Run a command on the arguments of the command line.

    Errors that a user can fix (ValueError, a missing file, a full disk, a missing package) end with one message and
    exit status 2. With PTP_TRACEBACK=1 in the environment they are raised. Ctrl-C and SIGTERM end with one line, too.
    """
    args = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may be unable to show a character
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("PTP_TRACEBACK"):
        dispatch(args)
        return
    try:
        with stoppable():
            dispatch(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {plain_reason(str(error))}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt as stop:
        print(f"\nstopped by {'SIGTERM' if isinstance(stop, TerminatedError) else 'Ctrl-C'}", file=sys.stderr)
        sys.exit(status_of(stop))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings as one line, "note: ..", without the place in the code where they are raised."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


def option_parser(command: str, description: str) -> ArgumentParser:
    """A parser for the options of a command, which raises errors and takes no abbreviations."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"python -m ptp_lightning {command}", description=description, exit_on_error=False, allow_abbrev=False
    )


def parsed_options(command: str, parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """The options of a command.

    Raises:
        ValueError: the parser refuses them.
    """
    try:
        return parser.parse_args(list(args))
    except ArgumentError as error:
        raise refused_options(command, error) from error


def refused_options(command: str, error: ArgumentError) -> ValueError:
    """The ValueError for options that jsonargparse refuses, in one line and by the names of the options.

    >>> refused_options("export", ArgumentError(None, 'Parser key "dtype":\\n  expected float32'))
    ValueError('export: --dtype: expected float32 (--help lists the options)')
    """
    reason = re.sub(r'Parser key "(\w+)"([^:]*):', r"--\1\2:", " ".join(str(error).split()))
    return ValueError(f"{command}: {reason} (--help lists the options)")


def plain_reason(message: str) -> str:
    """An error message without the lines that say nothing to users; wrong values of jsonargparse in one line.

    >>> plain_reason("Errors:\\n  - Expected a <class 'NoneType'>\\n  - expected rank > 0, found 0")
    'expected rank > 0, found 0'
    >>> plain_reason("Parser key \\"trainer.max_steps\\":\\n  Expected a <class 'int'>. Got value: many")
    'expected int for trainer.max_steps, found many'
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    kept = [line for line in lines if not _NOISE.match(line)]
    key, types = _KEY.match(kept[0]) if kept else None, [_TYPE.match(line) for line in kept[1:]]
    if key is None or not types or not all(types):
        return "\n".join(kept)
    expected = [name for match in types if match for name in _expected(match)]
    found = [match["found"] for match in types if match and match["found"]]
    found += [line.removeprefix(_GIVEN) for line in lines if line.startswith(_GIVEN)] or ["another value"]
    one_of = "one of " if len(set(expected)) > 1 else ""
    return f"expected {one_of}{', '.join(dict.fromkeys(expected))} for {key['key']}, found {found[0]}"


def _expected(match: re.Match[str]) -> list[str]:
    """Names of types or the values of a Literal."""
    if match["values"]:
        return [value.strip(" '\"") for value in match["values"].split(",")]
    return [(match["type"] or "a class path").rpartition(".")[2]]
