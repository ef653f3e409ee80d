"""What a user reads when something they typed is wrong."""

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable

EXIT_CODE = 2

# Lines with which jsonargparse explains its search through type unions, and its dump of the whole value: they bury
# the one line about the misspelt or refused key.
_NOISE = re.compile(
    r"^\s*(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|- Expected a <class 'NoneType'>"
    r"|Given value type: .*|Given value: .*)$"
)


def run_plainly(dispatch: Callable[[list[str]], None]) -> None:
    """Run a command on the arguments of the command line.

    What a user can set (ValueError, a missing file, a full disk, a missing package) ends as one message and status 2.
    Set PTP_TRACEBACK=1 to see where it was raised.
    """
    args = sys.argv[1:]
    if os.environ.get("PTP_TRACEBACK"):
        dispatch(args)
        return
    try:
        dispatch(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {plain_reason(str(error))}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def refused_options(command: str, error: ArgumentError) -> ValueError:
    """What to raise where jsonargparse refuses options: it speaks of parser keys, over several lines."""
    reason = re.sub(r'Parser key "(\w+)"([^:]*):', r"--\1\2:", " ".join(str(error).split()))
    return ValueError(f"{command}: {reason} (--help lists the options)")


def plain_reason(message: str) -> str:
    """The lines of an error message that say what to set."""
    lines = [line for line in message.splitlines() if line.strip() and not _NOISE.match(line)]
    return "\n".join(line.strip().removeprefix("- ") for line in lines)
