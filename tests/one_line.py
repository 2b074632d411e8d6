"""What every error has to be: one line, with the value, the rule and the way out."""

from __future__ import annotations

import re

import pytest

from jaxllm.cli import main


def check_message(text: str, *parts: str) -> None:
    """One line that holds all of these regular expressions."""
    assert "\n" not in text.strip() and len(text) < 800, text
    for part in parts:
        assert re.search(part, text), f"{part!r} is not in: {text}"


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error that the command line prints; it must leave with code 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        code = error.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]
