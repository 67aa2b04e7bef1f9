"""One message of the transcript, laid out as lines. Drawn by ``Transcript``; no widget itself."""

from __future__ import annotations

import re

from mlxtx.tui.clean import clean, duration, size
from mlxtx.tui.lines import BLANK, Line, code_tail, layout, styled, wrap, wrap_plain
from mlxtx.tui.markdown import Block, Splitter, parse
from mlxtx.tui.store import Message
from textual.content import Content
from textual.style import Style

# A pasted file is folded to its first lines; Enter on the message shows all.
_LONG_USER_LINES = 40
_SHOWN_USER_LINES = 12
_USER_BAR = "▌ "
# Models write their thinking between marks such as <think> and </think>.
_MARKS = re.compile(r"^<\|?[\w/]+\|?>|<\|?/?[\w/]+\|?>$")


class MessageView:
    """The lines of ``message`` at a width. Text that is finished is laid out once; while a reply
    grows, only its open piece is laid out again."""

    def __init__(self, message: Message, version: int = 1, versions: int = 1) -> None:
        self.message = message
        self.version, self.versions = version, versions
        self.unfolded = False
        self.note = ""
        self.last = False
        self.strips: dict[int, object] = {}
        self._splitter = Splitter()
        self._blocks: list[Block] = []
        self._fed = 0
        self._width = 0
        self._head: list[Line] = []
        self._body: list[Line] = []
        self._tail: list[Line] = []

    @property
    def code_blocks(self) -> list[str]:
        """The sources of its code blocks, in reading order."""
        self._feed()
        return [block.source for block in self._blocks if block.kind == "code"]

    def height(self, width: int) -> int:
        """Lay out what has changed and tell how many lines there are."""
        if width != self._width:
            self.strips.clear()
            self._width = width
            self._body = []
            for block in self._blocks:
                self._lay_out(block)
        before = len(self._head)
        if self.message.role == "user":
            self._head = self._user_lines(width)
            self._tail = []
        else:
            self._head = [BLANK, *self._thinking_lines(width)]
            self._feed()
            self._tail = [*self._open_lines(width), *self._foot_lines(width)]
        if len(self._head) != before:
            self.strips.clear()
        return len(self._head) + len(self._body) + len(self._tail)

    def line(self, at: int) -> Line:
        for part in (self._head, self._body, self._tail):
            if at < len(part):
                return part[at]
            at -= len(part)
        return BLANK

    def is_settled(self, at: int) -> bool:
        """Whether line ``at`` is one that growing does not change."""
        return 0 <= at - len(self._head) < len(self._body)

    def invalidate(self) -> None:
        """Lay everything out again, as after a change of the message's text."""
        self._splitter, self._blocks, self._fed, self._width = Splitter(), [], 0, 0
        self.strips.clear()

    def _feed(self) -> None:
        text = self.message.text
        pieces = self._splitter.feed(clean(text[self._fed :])) if len(text) > self._fed else []
        self._fed = len(text)
        if self.message.state != "streaming":
            pieces += self._splitter.finish()
        for piece in pieces:
            for block in parse(piece):
                self._blocks.append(block)
                self._lay_out(block)

    def _lay_out(self, block: Block) -> None:
        if not self._width:
            return
        # Code stands apart from prose even where the source left no blank line.
        after_code = bool(self._body) and self._body[-1].fill == ".code"
        if self._body and (block.gap or block.kind == "code" or after_code):
            self._body.append(BLANK)
        self._body += layout(block, self._width)

    def _open_lines(self, width: int) -> list[Line]:
        splitter = self._splitter
        if not splitter.tail:
            return []
        after_code = bool(self._body) and self._body[-1].fill == ".code"
        gap = splitter.tail_gap or splitter.tail_is_code or after_code
        lines = [BLANK] if self._body and gap else []
        if splitter.tail_is_code:
            return lines + code_tail(splitter.tail, width)
        return lines + wrap_plain(splitter.tail, width)

    def _user_lines(self, width: int) -> list[Line]:
        inner = max(1, width - len(_USER_BAR) - 1)
        lines = []
        for part in self.message.attachments:
            count = part.get("tokens")
            figure = f"{count:,} tokens" if count is not None else size(part.get("bytes", 0))
            lines += wrap_plain(f"@{clean(part['name'])}  {figure}", inner, ".attachment")
        text = clean(self.message.text).strip("\n")
        if text:
            lines += wrap_plain(text, inner)
        if len(lines) > _LONG_USER_LINES and not self.unfolded:
            more = f"… {len(lines) - _SHOWN_USER_LINES:,} more lines (enter shows them)"
            lines = [*lines[:_SHOWN_USER_LINES], Line(styled(more, ".note"), lead=len(more))]
        bar = styled(_USER_BAR, ".user-bar")
        drawn = [
            Line(bar + line.content, ".user", line.wrapped, len(_USER_BAR) + line.lead)
            for line in lines
        ]
        return [BLANK, *drawn, *self._foot_lines(width)]

    def _thinking_lines(self, width: int) -> list[Line]:
        message = self.message
        if not message.thinking:
            return []
        open_now = message.state == "streaming" and not message.text
        arrow = "▾" if self.unfolded else "▸"
        words = "Thinking" if open_now else "Thought"
        taken = duration(message.thinking_seconds) if message.thinking_seconds else ""
        text = f"{arrow} {words} for {taken}" if taken else f"{arrow} {words}…"
        click = Style.from_meta({"@click": f"screen.fold({message.id})"})
        head = Line(Content.styled(text, ".note").stylize(click), lead=len(text))
        if not self.unfolded:
            return [head, BLANK]
        bar = styled("│ ", ".note")
        body = [
            Line(bar + line.content, "", line.wrapped, 2)
            for line in wrap_plain(_thought(message.thinking), max(1, width - 2), ".thinking")
        ]
        return [head, *body, BLANK]

    def _foot_lines(self, width: int) -> list[Line]:
        message = self.message
        if message.state == "streaming":
            return [Line(styled(self.note, ".note"))] if self.note and not message.text else []
        parts: list[Content] = []
        if self.versions > 1:
            parts.append(self._switch())
        if message.state in ("stopped", "failed", "lost"):
            words = {"stopped": "stopped", "failed": "failed", "lost": "cut off"}[message.state]
            reason = clean(str(message.stats.get("error", "")))
            parts.append(
                styled(f"{words}: {reason}" if reason else words, f".state-{message.state}")
            )
        if self.last and message.role == "assistant":
            parts += [styled(text, ".note") for text in figures(message)]
        if not parts:
            return []
        foot = Content("  ").join(parts)
        gap = [BLANK] if self._body and message.role == "assistant" else []
        return [*gap, *(Line(part, lead=len(part.plain)) for part in wrap(foot, width))]

    def _switch(self) -> Content:
        def arrow(text: str, step: int) -> Content:
            click = Style.from_meta({"@click": f"screen.version({self.message.id}, {step})"})
            return Content.styled(text, ".switch").stylize(click)

        middle = styled(f" {self.version}/{self.versions} ", ".note")
        return arrow("◂", -1) + middle + arrow("▸", 1)


def _thought(text: str) -> str:
    """The thinking without the marks around it."""
    return _MARKS.sub("", clean(text).strip()).strip()


def figures(message: Message) -> list[str]:
    """What is said under the last reply: the model, tokens, speed."""
    stats = message.stats
    out = [message.model] if message.model else []
    if stats.get("generated_tokens"):
        out.append(f"{stats['generated_tokens']:,} tokens")
    if stats.get("decode_tokens_per_second"):
        out.append(f"{stats['decode_tokens_per_second']:.0f} tok/s")
    return out
