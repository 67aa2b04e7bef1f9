"""A two-way map between a family's tensor names and ours, as data.

A ``NameMap`` is a list of rules. Each rule ties a group of their tensors to a group of ours and
says how the numbers move (``Split``, ``Stacked``, ``Transposed`` ...), in both directions. Names
that no rule claims are the same on both sides, so the map of a Llama-like family is empty.

Names in rules are templates: ``{i}`` stands for a layer number, ``{e}`` for an expert number. A
template that ends in ``.weight``, ``.bias``, ``.scales`` or ``.biases`` means that one tensor;
any other means a module, whose tensors (those four endings) all move along.

Two layouts can be written: "hf", the family's own names, and "mlx", the names that MLX checkpoints
are published with (stacked experts, transposed Conv1D). A rule belongs to one or to both, or to
"read", which is never written. Reading tries every rule, so every layout loads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mlxtx.errors import MlxtxError
from mlxtx.naming.transforms import Same, Stacked, Transform

if TYPE_CHECKING:
    import mlx.core as mx

Layout = Literal["hf", "mlx", "read"]
Shape = tuple[int, ...]
SUFFIXES = (".weight", ".bias", ".scales", ".biases")


def split_suffix(name: str) -> tuple[str, str]:
    """``a.b.weight`` -> (``a.b``, ``.weight``); a name without a known ending -> (name, "")."""
    path, dot, last = name.rpartition(".")
    return (path, dot + last) if dot + last in SUFFIXES else (name, "")


@dataclass(frozen=True)
class Template:
    """A name with ``{i}``-like numbers in it, cut into a key to look up and the numbers."""

    text: str

    @cached_property
    def slots(self) -> tuple[str | int, ...]:
        """What stands at each number: a placeholder's name, or a number that must be equal."""
        parts = re.findall(r"(?:^|(?<=\.))(?:\{(\w+)\}|(\d+))(?=\.|$)", self.text)
        return tuple(placeholder or int(number) for placeholder, number in parts)

    @cached_property
    def key(self) -> str:
        return name_key(re.sub(r"\{\w+\}", "0", self.text))[0]

    def bind(self, numbers: Sequence[int]) -> dict[str, int] | None:
        """The placeholders' values in a name with this key, or None where a number differs."""
        values: dict[str, int] = {}
        for slot, number in zip(self.slots, numbers, strict=True):
            wanted = slot if isinstance(slot, int) else values.setdefault(slot, number)
            if number != wanted:
                return None
        return values

    def fill(self, values: Mapping[str, int]) -> str:
        return self.text.format(**values)


def name_key(name: str) -> tuple[str, tuple[int, ...]]:
    """``h.3.attn`` -> (``h.#.attn``, (3,)): one dictionary look-up instead of many patterns."""
    parts = name.split(".")
    numeric = {part for part in parts if part.isdecimal() and len(part) < 20}  # or int() may refuse
    key = ".".join("#" if part in numeric else part for part in parts)
    return key, tuple(int(part) for part in parts if part in numeric)


@dataclass(frozen=True)
class Rule:
    """``sources`` (their templates) <-> ``targets`` (ours), by ``transform``.

    layout: the layout this rule writes (None: both; "read": none). when: reads the shape of the first
    source and says whether the rule applies (for names that two layouts share). single: the names
    are those of tensors although they have none of the four endings.
    A source with ``{e}`` stands for all experts, in order; it is the only source of its rule.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform = field(default_factory=Same)
    layout: Layout | None = None
    when: Callable[[Shape], bool] | None = None
    single: bool = False

    @cached_property
    def exact(self) -> bool:
        """Whether the templates name single tensors (else modules, whose endings ride along)."""
        return self.single or any(split_suffix(text)[1] for text in self.targets)

    @cached_property
    def source_templates(self) -> list[Template]:
        return [Template(text) for text in self.sources]

    @cached_property
    def target_templates(self) -> list[Template]:
        return [Template(text) for text in self.targets]


@dataclass(frozen=True)
class Drop:
    """Source tensors that carry nothing a model needs (``*`` matches anything): read and left out.

    when: reads the shape, for names that a real parameter could share.
    """

    pattern: str
    when: Callable[[Shape], bool] | None = None

    @property
    def ending(self) -> str:
        return self.pattern.rpartition("*")[2]

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(".*".join(re.escape(part) for part in self.pattern.split("*")))

    def matches(self, name: str, shape: Shape) -> bool:
        return bool(self.regex.fullmatch(name)) and (self.when is None or self.when(shape))


class Group(NamedTuple):
    """Tensors that have to be moved together: ``apply`` turns ``sources`` into ``targets``.

    saving: the direction; False reads (theirs to ours), True writes (ours to theirs).
    suffix: the ending that decides which axis holds the rows.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform = Same()
    suffix: str = ""
    saving: bool = False

    @property
    def keeps_packing(self) -> bool:
        """Whether packed (quantized) weights can go through as they are."""
        return self.transform.packed

    def apply(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The targets' arrays, lazy. ``arrays`` are the sources' in order. Any shape that does not
        fit the rule is an error that names the tensors and their shapes."""
        move = self.transform.save if self.saving else self.transform.load
        try:
            moved = move(list(arrays), -1 if self.suffix == ".bias" else -2)
        except (ValueError, IndexError) as error:
            given = ", ".join(
                f"{n} {tuple(a.shape)}" for n, a in zip(self.sources[:4], arrays, strict=False)
            )
            raise MlxtxError(
                f"cannot turn {given} into {', '.join(self.targets[:4])}: {error}"
            ) from None
        return moved


@dataclass
class Plan:
    """What to do with a set of tensors: ``groups`` in the order of the first tensor of each,
    ``dropped`` names, and ``incomplete`` rules: (names that are there, names that lack)."""

    groups: list[Group]
    dropped: list[str]
    incomplete: list[tuple[tuple[str, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class NameMap:
    """The rules of one model's checkpoint.

    aliases: (pattern, replacement) regular expressions for other spellings of the family's own
    names found in the wild; they are read and never written.
    """

    rules: tuple[Rule, ...] = ()
    drops: tuple[Drop, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def plan_load(self, shapes: Mapping[str, Shape]) -> Plan:
        """Groups that turn a checkpoint's tensors (name -> shape) into ours."""
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        endings = tuple(drop.ending for drop in self.drops)  # most names are told by theirs
        dropped = [
            n
            for n, s in shapes.items()
            if n.endswith(endings) and any(d.matches(n, s) for d in self.drops)
        ]
        skipped = set(dropped)
        names: dict[str, str] = {}  # family's name -> the name in the file
        for original in shapes:
            if original in skipped:
                continue
            name = self.canonical(original)
            if name in names:
                raise MlxtxError(f"the checkpoint holds {name} twice: {names[name]} and {original}")
            names[name] = original
        finder = _Finder(names if self.rules else ())
        groups: dict[str, Group] = {}
        incomplete = []
        for rule in self.rules:
            for suffix, values, found in finder.match(rule.source_templates, rule.exact):
                sources, lacking = _in_order(rule.source_templates, found, values, suffix)
                if rule.when and not rule.when(shapes[names[sources[0]]]):
                    continue
                if lacking:
                    incomplete.append((tuple(sources), tuple(lacking)))
                    continue
                targets = tuple(t.fill(values) + suffix for t in rule.target_templates)
                finder.claim(sources)
                ending = suffix or split_suffix(targets[0])[1]
                originals = tuple(names[s] for s in sources)
                groups[originals[0]] = Group(originals, targets, rule.transform, ending)
        rest = finder.unclaimed() if self.rules else set(names)
        for name in rest:
            groups[names[name]] = Group((names[name],), (name,), suffix=split_suffix(name)[1])
        order = {name: n for n, name in enumerate(shapes)}
        return Plan(
            [groups[first] for first in sorted(groups, key=order.__getitem__)],
            dropped,
            [(have, lack) for have, lack in incomplete if rest.intersection(have)],
        )

    def plan_save(self, shapes: Mapping[str, Shape], layout: Layout = "hf") -> Plan:
        """Groups that turn our tensors (name -> shape) into the names of ``layout``."""
        finder = _Finder({name: name for name in shapes})
        groups: dict[str, Group] = {}
        incomplete = []
        for rule in self.rules:
            if rule.layout not in (None, layout):
                continue
            for suffix, values, found in finder.match(rule.target_templates, rule.exact):
                ours, lacking = _in_order(rule.target_templates, found, values, suffix)
                if lacking:
                    incomplete.append((tuple(ours), tuple(lacking)))
                    continue
                theirs = tuple(
                    name
                    for template in rule.source_templates
                    for name in _experts(template, values, suffix, shapes[ours[0]])
                )
                finder.claim(ours)
                ending = suffix or split_suffix(ours[0])[1]
                groups[ours[0]] = Group(tuple(ours), theirs, rule.transform, ending, saving=True)
        rest = finder.unclaimed()
        for name in rest:
            groups[name] = Group((name,), (name,), suffix=split_suffix(name)[1], saving=True)
        order = {name: n for n, name in enumerate(shapes)}
        return Plan(
            [groups[first] for first in sorted(groups, key=order.__getitem__)],
            [],
            [(have, lack) for have, lack in incomplete if rest.intersection(have)],
        )

    @cached_property
    def _spellings(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(pattern), new) for pattern, new in self.aliases]

    def canonical(self, name: str) -> str:
        """The family's own spelling of a name in a file."""
        for pattern, new in self._spellings:
            name = pattern.sub(new, name, count=1)
        return name


Found = dict[int, dict[int | None, str]]  # template number -> expert number -> name


class _Finder:
    """Names by key, so that a rule finds its tensors without trying every name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._left = dict.fromkeys(names)
        self._exact: dict[str, list[tuple[str, str, Shape]]] = defaultdict(list)
        self._modules: dict[str, list[tuple[str, str, Shape]]] = defaultdict(list)
        for name in self._left:
            key, numbers = name_key(name)
            self._exact[key].append((name, "", numbers))
            _, suffix = split_suffix(name)
            if suffix:
                self._modules[key.removesuffix(suffix)].append((name, suffix, numbers))

    def match(
        self, templates: list[Template], exact: bool
    ) -> list[tuple[str, dict[str, int], Found]]:
        """Every (suffix, placeholder values, names) for which some of ``templates`` is there."""
        table = self._exact if exact else self._modules
        hits: dict[tuple[Any, ...], Found] = defaultdict(lambda: defaultdict(dict))
        for index, template in enumerate(templates):
            for name, suffix, numbers in table.get(template.key, ()):
                values = template.bind(numbers) if name in self._left else None
                if values is not None:
                    expert = values.pop("e", None)
                    hits[suffix, tuple(sorted(values.items()))][index][expert] = name
        return [(suffix, dict(values), found) for (suffix, values), found in hits.items()]

    def claim(self, names: Iterable[str]) -> None:
        for name in names:
            del self._left[name]

    def unclaimed(self) -> set[str]:
        return set(self._left)


def _in_order(
    templates: list[Template], found: Found, values: Mapping[str, int], suffix: str
) -> tuple[list[str], list[str]]:
    """(the names that are there, in the templates' order; those that lack)."""
    names: list[str] = []
    lacking: list[str] = []
    for index, template in enumerate(templates):
        have = found.get(index, {})
        if "e" in template.slots:
            there = {e for e in have if e is not None}
            # A number far beyond the others lacks more than can be told: the first ones will do.
            wanted: list[int | None] = [
                *sorted(there.union(range(min(max(there, default=0), len(there)) + 1)))
            ]
        else:
            wanted = [None]
        for expert in wanted:
            if expert in have:
                names.append(have[expert])
            else:
                numbers = dict(values) if expert is None else {**values, "e": expert}
                lacking.append(template.fill(numbers) + suffix)
    return names, lacking


def _experts(template: Template, values: Mapping[str, int], suffix: str, shape: Shape) -> list[str]:
    if "e" not in template.slots:
        return [template.fill(values) + suffix]
    return [template.fill({**values, "e": e}) + suffix for e in range(shape[0])]


def rename(theirs: str, ours: str, layout: Layout | None = None) -> Rule:
    """One module or tensor under another name."""
    return Rule((theirs,), (ours,), layout=layout)


def stacked_experts(theirs: str, ours: str, projections: Mapping[str, str]) -> tuple[Rule, ...]:
    """One module an expert, ``theirs.<value>``, <-> one stacked module, ``ours.<key>`` [E, O, I].

    For example ``stacked_experts("model.layers.{i}.mlp.experts.{e}", "model.layers.{i}.mlp.
    switch_mlp", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"})``.
    """
    return tuple(
        Rule((f"{theirs}.{their}",), (f"{ours}.{our}",), Stacked(), layout="hf")
        for our, their in projections.items()
    )


# Buffers that older versions of transformers saved with the weights.
SAVED_BUFFERS = (
    Drop("*rotary_emb.inv_freq"),
    Drop("*.masked_bias"),
    Drop("*attn.bias", when=lambda shape: len(shape) == 4),
    Drop("*attention.bias", when=lambda shape: len(shape) == 4),
)
