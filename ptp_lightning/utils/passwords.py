"""Passwords in addresses: hidden before an address is printed, logged or stored."""

from __future__ import annotations

import re

HIDDEN = "***"
_IN_ADDRESS = re.compile(r"(?P<before>\b[\w+.-]+://[^\s:/@]*):[^\s/]*@")  # up to the last @, which it may contain
_IN_QUERY = re.compile(r"(?P<before>[?&\s](?:password|passwd|pwd|sslpassword)=)[^\s&'\"]+", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """A text in which passwords of addresses are replaced by three stars.

    >>> without_passwords("--storage postgresql://me:secret@host/studies")
    '--storage postgresql://me:***@host/studies'
    >>> without_passwords("postgresql://host/studies?user=me&password=secret")
    'postgresql://host/studies?user=me&password=***'
    """
    text = _IN_ADDRESS.sub(rf"\g<before>:{HIDDEN}@", text)
    return _IN_QUERY.sub(rf"\g<before>{HIDDEN}", text)
