"""A Jinja environment for templates nobody has vetted: no way out, and a budget on the way.

Out: Jinja's immutable sandbox, and within it only the filters, globals and methods that chat templates need.

Budget: checked at the head of every block, so in each turn of a loop and each call of a macro, and by every
operation that takes more than constant time (the generated code says so). Operations that could make something huge
at once (repetition, powers, joining, replacing, printing) are priced before they run, others by their result. A
container is priced with all it holds when it is written down or compared, so sharing does not make it cheap.

What this leaves: no single operation of the interpreter is interrupted, so the time may be overrun by one step over
MAX_STRING characters, some tens of milliseconds; and rendering shares the interpreter's lock with other threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from types import GeneratorType
from typing import Any, Final

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg

from worker_orcd.tokenizer.budget import Budget, BudgetExceeded

BUDGET_KEY: Final = "render budget"  # in a context's variables; no identifier, so no template can name it


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS: Final = _words("""
    abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string title trim unique upper""")
_PRINTING: Final = _words("capitalize e escape indent join lower replace safe string title trim upper")
_COMPARING: Final = _words("dictsort groupby max min sort unique")
_GLOBALS: Final = _words("range dict namespace joiner cycler")
_STRING_METHODS: Final = _words("""
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper""")
_MAX_COMPARED: Final = 10_000  # elements; comparing filters run some Python for each
_MAX_TITLE: Final = 2**16  # characters; the filter is slow
_MAX_WIDTH: Final = 64  # of an indentation; digits of rounding
_FIELD: Final = re.compile(r"\{(\w*)\}|\{\{|\}\}")  # of str.format; those with attributes or a width are not offered
_FORMAT_WIDTH: Final = re.compile(r"%[^a-zA-Z%]*([0-9]{3}|\*)")


class _Generator(CodeGenerator):
    """Writes calls of the environment's hooks around whatever takes more than constant time."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline(f"environment.enter(context, {_constant_text(nodes)})")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 (Jinja's names, here and below)
        if node.test is not None:
            node.test = nodes.Compare(node.test, [], lineno=node.lineno)  # checked, whatever it was
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        is_search = any(operand.op in ("in", "notin") for operand in node.ops)
        self.write('environment.paid(context, "value", (')
        self._paid("member" if is_search else "tree", self.visit, node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write("))")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        self.write(f" {operators[node.op]} ")
        if node.op in ("in", "notin"):
            self.visit(node.expr, frame)
        else:
            self._paid("tree", self.visit, node.expr, frame)

    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:  # noqa: N802
        self._paid("value", super().visit_Test, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        self._paid("value" if isinstance(node.arg, nodes.Slice) else "", super().visit_Getitem, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._paid("tree", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._paid("tree", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        self._paid("tree" if node.ctx == "load" else "", super().visit_Tuple, node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("str_join((")
        for part in node.nodes:
            self._paid("text", self.visit, part, frame)
            self.write(", ")
        self.write("))")

    def _paid(self, price: str, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        """What `visit` writes, within a call that takes this price of it, if any."""
        self.write(f'environment.paid(context, "{price}", ' if price else "")
        visit(node, frame)
        self.write(")" if price else "")


def _constant_text(block: Iterable[nodes.Node]) -> int:
    """Characters of the template's own text in a block, not in blocks within it."""
    parts = (part for node in block if isinstance(node, nodes.Output) for part in node.nodes)
    return sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Renders with the Budget found in the context's variables under BUDGET_KEY."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would run them before there is a budget
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._finalize(),
        )
        self.filters = {name: _priced(name, self.filters[name]) for name in _FILTERS}
        self.globals = {name: self.globals[name] for name in _GLOBALS}

    @staticmethod
    def _finalize() -> Callable[..., Any]:
        @pass_context
        def finalize(context: Context, value: object) -> object:
            _budget(context).text(value)
            return value

        return finalize

    def enter(self, context: Context, num_characters: int) -> None:
        """A block begins that prints `num_characters` of the template's own."""
        _budget(context).spend(1 + num_characters)

    def paid(self, context: Context, price: str, value: Any) -> Any:
        """The value, once its price is paid: `value`, `tree`, `member` or `text` of the Budget."""
        getattr(_budget(context), price)(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "*":
            budget.times(left, right)
        elif operator == "**":
            budget.power(left, right)
        elif operator == "%" and isinstance(left, str):
            _price_percent(budget, left, right)
        result = super().call_binop(context, operator, left, right)
        budget.tree(result) if isinstance(result, tuple) else budget.value(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _budget(__context)
        budget.spend()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", None)
        if isinstance(owner, str) and name == "format":
            return _formatted(budget, owner, args, kwargs)
        if isinstance(owner, str) and name == "join" and args:
            args = (list(args[0]),)
            budget.joined(owner, args[0])
        elif isinstance(owner, str) and name == "replace" and len(args) >= 2:
            budget.replaced(owner, args[0], args[1])
        return _metered(budget, super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, int | float | bytes | complex):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`call` does the formatting."""


def _budget(context: Context) -> Budget:
    budget = context.parent[BUDGET_KEY]
    assert isinstance(budget, Budget)
    return budget


def _metered(budget: Budget, result: Any) -> Any:
    """A result, paid for; one that comes element by element is paid for as it comes."""
    if isinstance(result, GeneratorType):
        return _metered_elements(budget, result)
    budget.value(result)
    return result


def _metered_elements(budget: Budget, elements: Iterator[Any]) -> Iterator[Any]:
    for element in elements:
        budget.spend()
        yield element


def _formatted(budget: Budget, pattern: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """`pattern.format(*args, **kwargs)` with plain fields."""
    if {"{", "}"} & {*_FIELD.sub("", pattern)}:
        raise SecurityError("only plain fields can be formatted")
    unnamed = count()

    def field(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        value = kwargs[name] if name and not name.isdecimal() else args[int(name) if name else next(unnamed)]
        budget.text(value)
        return str(value)

    text = _FIELD.sub(field, pattern)
    budget.string(len(text))
    return text


def _price_percent(budget: Budget, pattern: str, values: Any) -> None:
    """Price of `pattern % values`; every value may be printed by every sign in the pattern."""
    if _FORMAT_WIDTH.search(pattern):
        raise BudgetExceeded
    for _ in range(pattern.count("%")):
        budget.text(values)


def _priced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that pays for what it does."""
    passes = _PassArg.from_obj(function)

    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        value = _price_filter(budget, name, value, (*args, *kwargs.values()))
        lead = {None: (), _PassArg.context: (context,), _PassArg.eval_context: (context.eval_ctx,)}
        return _metered(budget, function(*lead.get(passes, (context.environment,)), value, *args, **kwargs))

    return pass_context(run)


def _price_filter(budget: Budget, name: str, value: Any, args: tuple[Any, ...]) -> Any:
    """Pay for a filter before it runs; returns the value to run it on."""
    budget.spend()
    if name == "join":
        value = list(value)
        budget.joined(args[0] if args and isinstance(args[0], str) else "", value)
    elif name in _PRINTING:
        budget.text(value)
    elif name in _COMPARING:
        value = value if isinstance(value, dict) else list(value)
        if len(value) > _MAX_COMPARED:
            raise BudgetExceeded
        budget.tree(value)
    if name == "replace" and isinstance(value, str) and len(args) >= 2:
        budget.replaced(value, str(args[0]), str(args[1]))
    if name == "title" and len(str(value)) > _MAX_TITLE:
        raise BudgetExceeded
    if name in ("indent", "round"):
        _price_width(budget, str(value).count("\n"), args)
    return value


def _price_width(budget: Budget, num_lines: int, args: tuple[Any, ...]) -> None:
    for width in args:
        if (width if isinstance(width, int) else len(str(width))) > _MAX_WIDTH:
            raise BudgetExceeded
    budget.string(num_lines * _MAX_WIDTH)
