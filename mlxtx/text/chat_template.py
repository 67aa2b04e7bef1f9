"""Chat templates: a checkpoint's own Jinja program that turns messages into a prompt.

Templates come from strangers, so they run in Jinja's immutable sandbox, see plain data only,
and have no loader, no Python objects and no files.
"""

from __future__ import annotations

import datetime
import json
import re
import string
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from mlxtx.errors import MlxtxError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
_LONGEST = 10_000_000  # characters or items that a template puts together; none needs more
_MOST_STEPS = 2_000_000  # turns of loops and calls in one rendering
_PROBE = "Does a text show?"
# Templates are written against transformers, where these two are always defined.
_ALWAYS = {"tools": None, "documents": None}


class ChatTemplate:
    """One or more named templates of a checkpoint ("default", "tool_use", "rag" ...)."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)

    def choose(self, name: str | None, tools: Any) -> str:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise MlxtxError(
                f"no chat template is named {name!r}; this model has: {', '.join(self.sources)}"
            )
        return self.sources[name]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages`` (dicts with role and content).

        ``variables`` reach the template by name (bos_token, enable_thinking ...).
        """
        import jinja2

        source = self.choose(name, tools)
        if _wants_parts(source):
            messages = [_in_parts(message) for message in messages]
        given = _plain({"messages": list(messages), **_ALWAYS, "tools": tools, **variables})
        _budget.steps = _MOST_STEPS
        try:
            return _compile(source).render(add_generation_prompt=add_generation_prompt, **given)
        except jinja2.TemplateSyntaxError as error:
            raise MlxtxError(
                f"the chat template has an error in line {error.lineno}: {error.message}"
            ) from error
        except jinja2.TemplateError as error:
            raise MlxtxError(f"the chat template refused these messages: {error}") from error
        except RecursionError as error:
            raise MlxtxError("the chat template calls itself without end") from error
        except Exception as error:  # a program of a stranger's can fail in any way
            raise MlxtxError(f"the chat template failed on these messages: {error}") from error


def plain_transcript(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """What stands in where a checkpoint has no template: "role: content" lines."""
    lines = [f"{message['role']}: {message.get('content') or ''}\n" for message in messages]
    return "".join(lines) + ("assistant:" if add_generation_prompt else "")


class _Budget(threading.local):
    """What a rendering may still do: a template must not run for ever, nor fill the memory."""

    steps = 0

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise ValueError(f"it takes more than {_MOST_STEPS:,} steps")


_budget = _Budget()


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.spend()
        yield item


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > _LONGEST:
        raise ValueError("it makes a text that is too long")
    return value


def _joined(parts: Iterable[str]) -> str:
    """What jinja2 puts a rendering, a macro and a block together with."""
    found, size = [], 0
    for part in parts:
        size += len(part)
        if size > _LONGEST:
            raise ValueError("it makes a text that is too long")
        found.append(part)
    return "".join(found)


def _check_text(method: str, text: str, *values: Any) -> None:
    """Raises ValueError where a text's method, or the filter of that name, would make it too long:
    where it takes a width, fills in a form, or puts longer texts in the place of short ones."""
    numbers = [value for value in values if isinstance(value, int)]
    longest = max([32, *(len(value) for value in values if isinstance(value, str))])
    size = len(text)
    if method in ("center", "ljust", "rjust", "zfill"):
        size = max([size, *numbers])
    elif method == "expandtabs":
        size += text.count("\t") * max([8, *numbers])
    elif method == "indent":
        size += (1 + text.count("\n")) * max([longest, *numbers])
    elif method == "replace" and len(values) > 1:
        size += text.count(str(values[0])) * len(str(values[1]))
    elif method == "%":
        forms = re.findall(r"%(?:\(.*?\))?([^a-zA-Z%]*)", text)
        size += len(forms) * longest + max([0, *(_LONGEST * _wide(form, "*") for form in forms)])
    elif method in ("format", "format_map"):
        forms = [form or "" for _, _, form, _ in string.Formatter().parse(text)]
        size += len(forms) * longest + max([0, *(_LONGEST * _wide(form, "{") for form in forms)])
    if size > _LONGEST:
        raise ValueError("it makes a text that is too long")


def _checked(filter: Callable[..., Any], name: str, first: int) -> Callable[..., Any]:
    """A filter of jinja2's that looks at its text, argument number ``first``, before it works."""
    method = "%" if name == "format" else name

    @wraps(filter)
    def checked(*arguments: Any, **named: Any) -> Any:
        values = (*arguments[first + 1 :], *named.values())
        _check_text(method, str(arguments[first]), *values)
        return filter(*arguments, **named)

    return checked


def _wide(form: str, given: str) -> bool:
    """Whether the form of a field asks for a great width, or for one that is ``given`` with it."""
    return given in form or re.search(r"\d{6}", form) is not None


def _plain(value: Any) -> Any:
    """JSON data only: a template must not reach the methods of a caller's objects."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise MlxtxError(f"messages and tools must be plain JSON data: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Bounds(jinja2.visitor.NodeTransformer):
        """Counts the turns of every loop, and looks at what ``~`` puts together."""

        def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
            self.generic_visit(node)
            node.iter = self.filtered(node.iter, "mlxtx_counted")
            return node

        def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
            self.generic_visit(node)
            return self.filtered(node, "mlxtx_bounded")

        def filtered(self, node: Any, name: str) -> jinja2.nodes.Filter:
            return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%"])
        concat = staticmethod(_joined)

        def _parse(self, *source: Any) -> jinja2.nodes.Template:
            return Bounds().visit(super()._parse(*source))

        def call(self, *function: Any, **arguments: Any) -> Any:
            _budget.spend(10)  # about what it costs beside a turn of a loop
            _, method, *values = function
            text = getattr(method, "__self__", None)
            if isinstance(text, str):
                _check_text(method.__name__, text, *values, *arguments.values())
            return super().call(*function, **arguments)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """The sandbox bounds ``range``; repeated strings and powers fill the memory too."""
            if operator == "**" and not (abs(left) <= 1e6 and abs(right) <= 64):
                raise jinja2.sandbox.SecurityError("a power in the chat template is too large")
            if operator == "%" and isinstance(left, str):
                _check_text("%", left, *(right if isinstance(right, tuple) else [right]))
            for text, times in ((left, right), (right, left)):
                repeats = isinstance(text, str | list | tuple) and isinstance(times, int)
                if operator == "*" and repeats and len(text) * times > _LONGEST:
                    raise jinja2.sandbox.SecurityError("the chat template repeats a text too often")
            return _bounded(super().call_binop(context, operator, left, right))

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters |= {
        "tojson": _to_json,
        "mlxtx_counted": _counted,
        "mlxtx_bounded": _bounded,
    }
    for name, first in (("center", 0), ("indent", 0), ("replace", 1), ("format", 0)):
        environment.filters[name] = _checked(environment.filters[name], name, first)
    environment.globals.pop("lipsum")  # makes up texts of any length
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _in_parts(message: Message) -> Message:
    """A text as the only part of a list, which could hold images too."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


@cache
def _wants_parts(source: str) -> bool:
    """Whether a template leaves out a text that is not one of a list of parts, as those of some
    multimodal models do."""

    def shows(message: Message) -> bool:
        _budget.steps = _MOST_STEPS
        tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
        try:
            return _PROBE in _compile(source).render(messages=[message], **_ALWAYS, **tokens)
        except Exception:  # a program of a stranger's; rendering what was meant will tell
            return False

    probe = {"role": "user", "content": _PROBE}
    return not shows(probe) and shows(_in_parts(probe))


@cache
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)
