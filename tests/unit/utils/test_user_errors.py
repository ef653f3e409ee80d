"""Messages reach the user whatever a terminal can show."""

import io
import sys

import pytest

from ptp_lightning.utils.user_errors import plain_reason, run_plainly


def test_terminals_without_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `LC_ALL=C` or `PYTHONIOENCODING=ascii` they cannot show a snowman."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "generate"])

    def speak(args: list[str]) -> None:
        print("text \u2603")
        raise ValueError("no \u2603")

    with pytest.raises(SystemExit, match="2"):
        run_plainly(speak)
    written = {}
    for name, stream in streams.items():
        stream.flush()
        assert isinstance(stream.buffer, io.BytesIO)
        written[name] = stream.buffer.getvalue()
    assert written == {"stdout": b"text \\u2603\n", "stderr": b"error: no \\u2603\n"}


def test_advice_of_the_parser_about_classes_is_left_out() -> None:
    """It follows the one line about the argument that a class refuses."""
    message = (
        "Unsupported parameter value `Timer(interval=foo)`. Possible choices are: step, epoch\n"
        "Not a valid subclass of Callback\nSubclass types expect one of:\n  a class path (str)\n"
        "  a dict with class_path entry\n  a dict without class_path but with init_args entry (given before)\n"
        "  a dict with parameters accepted by the base class (implicit class_path)"
    )
    assert plain_reason(message) == message.splitlines()[0]
