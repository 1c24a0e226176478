"""`lavin-ds chat` as a person uses it: a terminal, with the base that ships."""

import json
import os
import pty
import re
import select
import sys
import time

import pytest
from generation_helpers import ASSETS

PROGRAM = "from lavin_ds.cli.main import run; run()"


class Terminal:
    """A chat in a terminal of its own, whose Ctrl-C reaches it as a signal."""

    def __init__(self, *words):
        self.code: int | None = None
        self.process, self.master = pty.fork()
        if not self.process:
            os.execv(sys.executable, [sys.executable, "-c", PROGRAM, "chat", *words])

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        shown, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, shown):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {pattern!r}, read {shown!r}"
            shown += os.read(self.master, 4096).decode()
        return shown

    def wait(self) -> int:
        """The exit code."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self.code

    def close(self) -> None:
        os.close(self.master)  # which hangs up
        self.code = self.code if self.code is not None else os.waitpid(self.process, 0)[1]


@pytest.fixture
def terminal(tmp_path):
    chat = Terminal("--recipe", "tiny-base", "--llama", str(ASSETS / "llama"), "--max-new-tokens", "20")
    yield chat
    chat.close()


def test_a_conversation_in_a_terminal(terminal, tmp_path):
    greeting = terminal.read_until("> $")
    assert "Trained on ScienceQA" in greeting and "/help lists commands" in greeting
    terminal.type("Which is red? (A) the sky (B) a rose\n")
    assert re.search(r"The answer is [A-Z]\.", terminal.read_until(r"\n> $"))
    terminal.type("/image nothing.png\n")
    assert "text-only: it sees no pictures" in terminal.read_until(r"\n> $")
    terminal.type("/foo\n")
    assert "/foo is not a command" in terminal.read_until(r"\n> $")
    saved = tmp_path / "talk.json"
    terminal.type(f"/save {saved}\n")
    assert "Saved 1 turns" in terminal.read_until(r"\n> $").replace("\r\n", "")
    assert json.loads(saved.read_text())["turns"][0]["asked"] == "Which is red? (A) the sky (B) a rose"
    terminal.type("\x03")  # Ctrl-C at the prompt does not end it
    assert "Ctrl-D ends" in terminal.read_until(r"\n> $")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program():
    chat = Terminal("--recipe", "tiny-base", "--llama", str(ASSETS / "llama"), "--max-new-tokens", "100")
    try:
        chat.read_until("> $")
        chat.type("hello\n")  # which the base answers with repetitions that do not end
        chat.read_until("Options: ")
        chat.type("\x03")
        chat.read_until(r"\n> $")
        chat.type("Which is red? (A) the sky (B) a rose\n")
        assert re.search(r"The answer is [A-Z]\.", chat.read_until(r"\n> $"))
    finally:
        chat.close()
