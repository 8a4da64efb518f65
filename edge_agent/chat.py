"""`edge-agent chat`: a conversation with a running agent, in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from edge_agent.client import AgentPlace, BrokenOff, Turn, asked, show_plan, streamed

PROMPT = "> "
HELP = """\
/route auto|local|cloud|split|speculative [LAYER]   where answers are made from now on
/quality fast|balanced|best                         the least agreement with the full model
/plan [TEXT]                                        the scores of the last turn, or of TEXT, which is not asked
/clear                                              forget what was said
/save FILE                                          write the conversation as JSON
/exit                                               leave, as the end of input does; Ctrl-C stops an answer"""
CHOICES = {"route": ("auto", "local", "cloud", "split", "speculative"), "quality": ("fast", "balanced", "best")}


def chat(agent: AgentPlace, settings: dict[str, Any], system: str | None, read: Callable[[str], str] = input) -> int:
    """Until the end of input. Returns the exit code; raises OSError without an agent."""
    with asked(agent, "GET", "/health"):
        pass
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited, where there is one
    talk = Conversation(agent, settings, system)
    talk.tell("a question, or /help")
    while not talk.over:
        try:
            if line := read(PROMPT).strip():
                talk.take(line)
        except EOFError:
            print()
            break
        except KeyboardInterrupt:
            print()
    return 0


class Conversation:
    """What was said so far, and how the next turn is asked for."""

    def __init__(self, agent: AgentPlace, settings: dict[str, Any], system: str | None):
        self.over = False
        self._agent, self._settings, self._plan = agent, settings, dict(settings["plan"])
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._last: dict[str, Any] = {}  # plan
        self._console = Console(highlight=False, soft_wrap=True)

    def tell(self, words: str) -> None:
        """Something about the conversation, not of it."""
        self._console.print(Text(words, style="dim"))

    def take(self, line: str) -> None:
        """A line that was typed: a command or a question. What goes wrong is told, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(*line[1:].split(maxsplit=1))
            else:
                self._ask(line)
        except (OSError, ValueError, BrokenOff) as error:
            self.tell(str(error))

    def _ask(self, question: str) -> None:
        asked, turn = {"role": "user", "content": question}, Turn()
        request = self._settings | {"plan": self._plan, "messages": [*self._messages, asked]}
        try:
            with closing(streamed(self._agent, request)) as chunks:
                for chunk in chunks:
                    print(turn.take(chunk), end="", flush=True)
        except KeyboardInterrupt:
            self.tell(" (stopped)")
        finally:
            if turn.text:
                self._messages += [asked, {"role": "assistant", "content": turn.text}]
        self._last = turn.plan
        if turn.plan:
            print()
            self.tell(turn.line)

    def _command(self, name: str = "", rest: str = "") -> None:
        match name, rest.split():
            case "exit" | "quit", []:
                self.over = True
            case "clear", []:
                self._messages = list(self._start)
                self.tell("forgotten")
            case "plan", [*words]:
                self._show_plan(" ".join(words))
            case "save", [_, *_]:
                self._save(Path(rest).expanduser())
            case "route" | "quality", [choice, *layer]:
                self._choose(name, choice, layer)
            case "route" | "quality", []:
                self.tell(f"{name} {self._plan[name]}")
            case _:
                self.tell(HELP)

    def _choose(self, name: str, choice: str, layer: list[str]) -> None:
        if choice not in CHOICES[name]:
            raise ValueError(f"{name} {choice!r} is none of {', '.join(CHOICES[name])}")
        if layer and not (choice in ("split", "speculative") and len(layer) == 1 and layer[0].isdecimal()):
            raise ValueError(f"{name} {choice} takes no {' '.join(layer)!r}")
        if name == "route":
            self._plan = {key: value for key, value in self._plan.items() if key not in ("split", "draft")}
        self._plan |= {name: choice, **({"split": int(layer[0])} if layer else {})}
        self.tell(" ".join([name, choice, *layer]))

    def _show_plan(self, words: str) -> None:
        if words:
            messages = [*self._messages, {"role": "user", "content": words}]
            request = self._settings | {"plan": self._plan, "messages": messages}
            with asked(self._agent, "POST", "/v1/plan", json=request) as lines:
                show_plan(json.loads("".join(lines))["plan"])
        elif self._last:
            show_plan(self._last)
        else:
            self.tell("nothing was asked yet")

    def _save(self, path: Path) -> None:
        try:
            said = json.dumps({"messages": self._messages}, ensure_ascii=False, indent=1)
            path.write_text(said + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        self.tell(f"{len(self._messages)} messages in {path}")
