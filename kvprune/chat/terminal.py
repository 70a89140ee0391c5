"""`kvprune chat`: lines of a person, or of a file, on one conversation."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvprune.cache.report import human_bytes
from kvprune.chat.conversation import Chat, Turn
from kvprune.errors import HistoryWarning, KVPruneError, QuestionWarning
from kvprune.policy.registry import parse

HELP = """\
What you write is said to the model, and these are commands:
  /read FILE     read a text and compress it; what you say next may ask about it
  /save PATH     write the conversation and its cache to a file
  /load PATH     go on with a conversation, or a document, that was saved
  /policy SPEC   compress by another policy; the next turn reads the conversation again. Without SPEC: which it is
  /report        what each layer holds
  /help          this
  /quit          leave, as the end of input does
Ctrl-C stops a command, or an answer; what has come of that was said."""


class Terminal:
    """Takes lines and writes answers, until there are no more or one says /quit.

    chat: to go on with. generation: settings of every answer, as of `Chat.say`. console: gets what is not an answer.
    """

    def __init__(self, chat: Chat, console: Console, **generation: Any) -> None:
        self.chat, self._console, self._generation = chat, console, generation
        self._commands: dict[str, Callable[[str], None]] = {
            "/read": self.read,
            "/save": self.save,
            "/load": self.load,
            "/policy": self.policy,
            "/report": self.report,
            "/help": self.help,
        }

    def begin(self, load: Path | None, read: Path | None) -> None:
        """What is to be there before the first line. Raises what `load` and `read` raise."""
        with self._warnings():
            for serve, path in ((self.load, load), (self.read, read)):
                if path is not None:
                    serve(shlex.quote(str(path)))

    def run(self) -> None:
        """Serve standard input. Mistakes are told, and the conversation goes on."""
        asks = sys.stdin.isatty()
        if asks:
            self._tell(f"{self.chat.policy}. /help lists the commands, /quit leaves.")
        while True:
            try:
                line = input("> ") if asks else sys.stdin.readline()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not asks and not line:
                return
            line = line.strip()
            if line in ("/quit", "/exit"):
                return
            if line:
                self.serve(line)

    def serve(self, line: str) -> None:
        """One line."""
        name, _, rest = line.partition(" ")
        try:
            with self._warnings():
                if not line.startswith("/"):
                    self.say(line)
                elif name in self._commands:
                    self._commands[name](rest.strip())
                else:
                    raise KVPruneError(f"there is no command {name}: /help lists those there are.")
        except KeyboardInterrupt:  # it ends what runs, and /quit the program
            print(" (stopped)")
        except KVPruneError as error:
            self._console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)

    # -- what lines may be -----------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Something that is said: the answer as it comes, then what it took and what is held."""
        pieces = self.chat.stream(text, **self._generation)
        begun = False
        try:
            for piece in pieces:
                piece, begun = piece if begun else piece.lstrip(), begun or bool(piece.strip())
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            print(" (stopped)", end="")
        print()
        if self.chat.last is not None:
            self._tell(f"{_told(self.chat.last)}; {held(self.chat)}")
            if self.chat.last.note:
                self._tell(self.chat.last.note)

    def read(self, path: str) -> None:
        try:
            text = Path(_path("/read", path)).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KVPruneError(f"cannot read {path}: {error}") from error
        started = time.perf_counter()
        count = self.chat.read(text)
        self._tell(f"{count:,} tokens read in {time.perf_counter() - started:.1f} s; {held(self.chat)}")

    def save(self, path: str) -> None:
        place = Path(_path("/save", path)).expanduser()
        self.chat.save(place)
        self._tell(f"saved to {place}, {human_bytes(place.stat().st_size)}")

    def load(self, path: str) -> None:
        place = Path(_path("/load", path)).expanduser()
        self.chat = Chat.load(place, self.chat.model, self.chat.tokenizer)
        said = sum(each["role"] == "user" for each in self.chat.messages)
        self._tell(f"{said:,} turn{'' if said == 1 else 's'}, {self.chat.policy}; {held(self.chat)}")

    def policy(self, text: str) -> None:
        if text:
            self.chat.policy = parse(text)
        again = "; the next turn reads the conversation for it" if text and self.chat.messages else ""
        self._tell(f"{self.chat.policy}{again}")

    def report(self, _: str) -> None:
        self._console.print(self.chat.report)

    def help(self, _: str) -> None:
        self._console.print(HELP, markup=False, highlight=False)

    # -- what is told ------------------------------------------------------------------------------------------------

    def _tell(self, text: str) -> None:
        self._console.print(escape(text), style="dim", highlight=False, soft_wrap=True)

    @contextmanager
    def _warnings(self) -> Iterator[None]:
        """Those of kvprune as a line; a turn's note says what a HistoryWarning does."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", QuestionWarning)
            warnings.simplefilter("ignore", HistoryWarning)
            others = warnings.showwarning

            def show(message: Any, category: type[Warning], *rest: Any) -> None:
                if issubclass(category, QuestionWarning):
                    self._tell(f"warning: {message}")
                else:
                    others(message, category, *rest)

            warnings.showwarning = show  # type: ignore[assignment]
            yield


def held(chat: Chat) -> str:
    """What the cache of a conversation holds, in a phrase."""
    report = chat.report
    kept = "" if report.kept_tokens is None else f"{round(report.kept_tokens):,} of {report.seen_tokens:,} tokens, "
    return (
        f"holds {kept}{human_bytes(report.nbytes)} instead of {human_bytes(report.dense_nbytes)} ({report.ratio:.0%})"
    )


def _told(turn: Turn) -> str:
    speed = ""
    if turn.new_tokens > 1 and turn.decode_seconds:
        speed = f" at {(turn.new_tokens - 1) / turn.decode_seconds:.1f} tokens/s"
    return f"{turn.read_tokens:,} tokens read in {turn.first_seconds:.1f} s, {turn.new_tokens:,} new{speed}"


def _path(command: str, text: str) -> str:
    """The one path that is given, quoted or not."""
    try:
        words = shlex.split(text) if text[:1] in "\"'" else [text]
    except ValueError as error:
        raise KVPruneError(f"{command} takes a path, and {text!r} is none ({error}).") from error
    if len(words) != 1 or not words[0]:
        raise KVPruneError(f"{command} takes a path, as in {command} talk.safetensors.")
    return words[0]
