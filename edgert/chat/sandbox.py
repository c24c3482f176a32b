"""Where chat templates run: jinja2's immutable sandbox, with bounds on memory and time.

Filters and methods that build large values out of small ones are absent or metered, and so are
loops and operators; nothing can be loaded. A list that holds another one twice, and so on forty
times, is small and takes forever to compare or to write: whatever looks into a value pays for all
that can be seen in it. The rest, white space included, is as in
huggingface/transformers, src/transformers/utils/chat_template_utils.py, which published templates
are written for.
"""

from __future__ import annotations

import json
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from edgert.errors import MissingDependency, UsageError

MAX_WORK = 64 * 2**20  # characters made on the way; an element of a list counts as 8
MAX_SECONDS = 5.0


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _names(
    """abs capitalize count d default dictsort e escape first float indent int items join last
    length list lower map max min reject rejectattr replace reverse safe select selectattr sort
    string title tojson trim truncate unique upper wordcount"""
)
SHALLOW = _names("count d default first last length")  # do not look into what they are given
LOOKING = _names("changed count index")  # methods that compare, or write what they miss
GLOBALS = _names("range cycler joiner")
METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        _names(
            """capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit
            islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix
            removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith
            strip swapcase title upper"""
        ),
    ),
    (dict, _names("copy get items keys values")),
    (list, _names("copy count index")),
    (tuple, _names("count index")),
    (bytes, frozenset()),
    (float, frozenset()),
    (int, frozenset()),
)


class Overstep(Exception):
    """A template went beyond its bounds."""


class Meter:
    """What one rendering may still make, and until when."""

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Overstep(f"it makes more than {MAX_WORK} characters on the way")
        if time.monotonic() > self._deadline:
            raise Overstep(f"it takes more than {MAX_SECONDS:g} s")

    def value(self, value: Any) -> Any:
        """The value, its text paid for; what a container holds twice is paid twice."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, Mapping):
            for item in value.items():
                self.value(item)
        elif isinstance(value, (list, tuple)):
            self.spend(8 * len(value))
            for item in value:
                self.value(item)
        else:
            self.spend(8)
        return value

    def seen(self, value: Any) -> Any:
        """The value, paid for as something that is looked into; a stream pays as it flows."""
        if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
            return map(self.value, value)
        return self.value(value)

    def looking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, paying for what it is given."""
        passed = int(hasattr(function, "jinja_pass_arg"))  # jinja's own first argument

        @wraps(function)
        def paying(*args: Any, **kwargs: Any) -> Any:
            given = [*args[:passed], *map(self.seen, args[passed:])]
            return function(*given, **{name: self.seen(value) for name, value in kwargs.items()})

        return paying

    def loop(self, items: Iterable[Any], static: int) -> Iterator[Any]:
        """The items of a loop whose body has `static` characters of plain text."""
        for item in items:
            self.spend(static)
            yield item

    def concat(self, values: list[Any]) -> str:
        return "".join(str(self.value(value)) for value in values)

    def replace(self, text: Any, old: Any, new: Any, *count: int) -> str:
        text, old, new = (str(self.value(part)) for part in (text, old, new))
        self.spend(len(text) + text.count(old) * len(new))
        return str(text.replace(old, new, *count))

    def join(self, text: str, items: Iterable[Any]) -> str:
        parts = list(self.loop(items, 8))
        self.spend(len(text) * len(parts))
        self.value(parts)
        return text.join(parts)

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Pays for `left operator right`, or refuses it, before it is computed."""
        sized = [side for side in (left, right) if isinstance(side, (str, list, tuple))]
        if operator == "%" and sized and sized[0] is left:
            raise Overstep("formatting with % is not available")
        if operator == "*" and sized:
            times = left if sized[0] is right else right
            self.spend(_weight(sized[0]) * max(int(times), 0))
        elif sized:
            self.spend(sum(map(_weight, sized)))
        elif operator in ("*", "**") and any(abs(side) > 2**64 for side in (left, right)):
            raise Overstep(f"numbers beyond 2**64 in {operator}")
        elif operator == "**" and abs(right) > 64:
            raise Overstep("exponents beyond 64")

    def to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise Overstep(f"tojson(indent={indent!r}) is not from 0 to 16")
        text = json.dumps(
            self.value(value),
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        self.spend(len(text))
        return text

    def indent(self, text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
        from jinja2.filters import do_indent

        if not (isinstance(width, int) and 0 <= width <= 64):
            raise Overstep(f"indent({width!r}) is not from 0 to 64")
        self.spend(len(text) + text.count("\n") * width)
        return do_indent(text, width, first, blank)


def _weight(value: Any) -> int:
    return len(value) if isinstance(value, str) else 8 * len(value)


def _raise_exception(message: object) -> NoReturn:
    raise UsageError(
        f"the chat template refuses these messages: {str(message)[:500]}",
        do="send the roles, and their order, that the model was trained with",
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:256])


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # not the type itself, whose attributes lead further


def compiled(source: str) -> Any:
    """The jinja2 template; its bounds count from now. Raises jinja2's errors and Overstep."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError, TemplateSyntaxError
        from jinja2.ext import Extension
        from jinja2.filters import sync_do_join
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
        from jinja2.visitor import NodeTransformer
    except ImportError as error:
        raise MissingDependency("jinja2", "cpu", why="it renders chat templates") from error
    meter = Meter()

    class PlainNamespace(Namespace):
        """No names with underscores: they could stand in for Python's own attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=1)` is legal
            for name in dict(*args[1:], **kwargs):
                PlainNamespace._check(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: object) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace may not hold {name!r}")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            for kind, methods in METHODS:
                if isinstance(obj, kind):
                    return attr in methods
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            if super().wrap_str_format(value) is not None:
                raise SecurityError("str.format is not available")
            return None

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            meter.spend(1)
            if name in LOOKING:
                meter.value([owner if isinstance(owner, (list, tuple)) else None, *args])
            if isinstance(owner, str) and name in ("replace", "join"):
                return getattr(meter, name)(owner, *args, **kwargs)
            result = super().call(__context, __obj, *args, **kwargs)
            return meter.value(result) if isinstance(result, str) else result

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            meter.operate(operator, left, right)
            result = super().call_binop(context, operator, left, right)
            return meter.value(result) if isinstance(result, tuple) else result

    class Metering(NodeTransformer):
        """Puts the meter into what the sandbox has no hook for, and refuses to load files."""

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            static = 1 + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.iter = filtered(node.iter, "__loop", nodes.Const(static))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
            self.generic_visit(node)
            return filtered(nodes.List(node.nodes, lineno=node.lineno), "__concat")

        def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
            self.generic_visit(node)
            node.expr = filtered(node.expr, "__seen")
            for operand in node.ops:
                operand.expr = filtered(operand.expr, "__seen")
            return node

        def visit_Test(self, node: nodes.Test) -> nodes.Test:
            self.generic_visit(node)
            if node.args:  # the others look at the kind of a value
                node.node = filtered(node.node, "__seen")
                node.args = [filtered(arg, "__seen") for arg in node.args]
            return node

        def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
            """Hashing is looking, and has no hook: tuples pay when they are made."""
            self.generic_visit(node)
            return filtered(node, "__seen") if node.ctx == "load" else node

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
            """A missing key is written out in the error."""
            self.generic_visit(node)
            if not isinstance(node.arg, (nodes.Const, nodes.Slice)):
                node.arg = filtered(node.arg, "__seen")
            return node

        def visit_Include(self, node: nodes.Node) -> NoReturn:
            raise TemplateSyntaxError("a chat template may not load other files", node.lineno)

        visit_Import = visit_FromImport = visit_Extends = visit_Include

    def filtered(value: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
        line = value.lineno
        return nodes.Filter(
            value, name, list(args), [], None, None, lineno=line, environment=sandbox
        )

    class Generation(Extension):
        """`{% generation %}` marks the model's words for training; here it only groups."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    sandbox = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
        finalize=meter.value,
    )
    known = sandbox.filters
    sandbox.filters = {name: known[name] for name in SHALLOW}
    sandbox.filters |= {name: meter.looking(known[name]) for name in FILTERS - SHALLOW}
    sandbox.filters |= {
        "__seen": meter.seen,
        "__loop": meter.loop,
        "__concat": meter.concat,
        "indent": meter.indent,
        "replace": meter.replace,
        "tojson": meter.to_json,
        "list": lambda value: list(meter.loop(value, 8)),
        "string": lambda value: str(meter.value(value)),
    }

    def join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        parts = list(meter.loop(value, 8 + len(str(meter.value(d)))))
        return str(meter.value(sync_do_join(context, meter.value(parts), d, attribute)))

    join.jinja_pass_arg = sync_do_join.jinja_pass_arg  # type: ignore[attr-defined]
    sandbox.filters["join"] = join
    sandbox.globals = {name: sandbox.globals[name] for name in GLOBALS} | {
        "dict": _dict,
        "namespace": PlainNamespace,
        "raise_exception": lambda message: _raise_exception(meter.value(message)),
        "strftime_now": _strftime_now,
    }
    return sandbox.from_string(Metering().visit(sandbox.parse(source)))
