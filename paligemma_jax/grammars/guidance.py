"""Answers that are JSON or match a regular expression, by the library llguidance.

Such a grammar has no finite table: the compiled loop asks the host which tokens may follow. The
host numbers each sequence of tokens that it is asked about, so that a row's position is an integer.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Int32

from paligemma_jax.grammars.constraint import Constraint
from paligemma_jax.processing.processor import AnyArray
from paligemma_jax.processing.tokenizer import Tokenizer

KEPT = 4096  # parsers in memory; others are made again from their tokens


@dataclass(frozen=True)
class Json:
    """JSON, of a JSON schema if there is one. Needs the extra `grammars`.

    Args:
        schema: The schema, as text or as a dict.
    """

    schema: str | Mapping[str, object] = "{}"

    def __post_init__(self):
        if not isinstance(self.schema, str):
            object.__setattr__(self, "schema", json.dumps(self.schema))

    @property
    def definition(self) -> str:
        return _llguidance().LLMatcher.grammar_from_json_schema(self.schema)


@dataclass(frozen=True)
class Regex:
    """Text that matches a regular expression as a whole. Needs the extra `grammars`."""

    pattern: str

    @property
    def definition(self) -> str:
        return _llguidance().LLMatcher.grammar_from_regex(self.pattern)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guide(Constraint):
    """The grammars of the rows, followed on the host."""

    parsers: Parsers = field(metadata=dict(static=True))
    starts: Int[AnyArray, " B"]  # the first node of each row

    def begin(self) -> Int32[Array, " B"]:
        return jnp.asarray(self.starts, jnp.int32)

    def permitted(
        self, position: Int32[Array, " rows"], left: Int[Array, ""]
    ) -> Bool[Array, "rows V"]:
        """Tokens that may follow. `left` is not used: the limit may cut an answer."""
        shape = jax.ShapeDtypeStruct((len(position), self.parsers.vocab_size), bool)
        return jax.pure_callback(self.parsers.permitted, shape, position)

    def advance(
        self, position: Int32[Array, " rows"], token: Int[Array, " rows"]
    ) -> Int32[Array, " rows"]:
        shape = jax.ShapeDtypeStruct(position.shape, jnp.int32)
        return jax.pure_callback(self.parsers.advance, shape, position, token)

    def for_rows(self, rows: Int[AnyArray, " B"]) -> Guide:
        return replace(self, starts=self.starts[rows])


class Parsers:
    """The parser of every sequence of tokens that was asked about, by its node in a tree.

    Args:
        definitions: Grammars of llguidance. Node i is the start of the i-th.
    """

    def __init__(
        self,
        definitions: Sequence[str],
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Sequence[int],
    ):
        library = _llguidance()
        self.vocab_size, self.eos_ids = vocab_size, list(eos_ids)
        engine = library.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos_ids[0])
        self.roots = [library.LLMatcher(engine, definition) for definition in definitions]
        self.nodes: list[tuple[int, int]] = [(i, -1) for i in range(len(self.roots))]
        self.children: dict[tuple[int, int], int] = {}
        self.kept: OrderedDict[int, Any] = OrderedDict()  # Any: llguidance's LLMatcher
        self.lock = threading.Lock()

    def permitted(self, nodes: Int[AnyArray, " rows"]) -> Bool[np.ndarray, "rows V"]:
        """Whether a token may follow, for each node."""
        with self.lock:
            return np.stack([self._permitted(node) for node in np.asarray(nodes).tolist()])

    def advance(
        self, nodes: Int[AnyArray, " rows"], tokens: Int[AnyArray, " rows"]
    ) -> Int32[np.ndarray, " rows"]:
        """The node after a token, for each node; the same node if the token may not follow."""
        pairs = zip(np.asarray(nodes).tolist(), np.asarray(tokens).tolist(), strict=True)
        with self.lock:
            return np.array([self._child(node, token) for node, token in pairs], np.int32)

    def _permitted(self, node: int) -> Bool[np.ndarray, " V"]:
        parser = self._parser(node)
        mask = np.zeros(self.vocab_size, bool)
        if parser.is_stopped():
            mask[self.eos_ids] = True
            return mask
        bits = np.frombuffer(parser.compute_bitmask(), np.uint8)
        mask[:] = np.unpackbits(bits, bitorder="little")[: self.vocab_size]
        mask[self.eos_ids] = parser.is_accepting()
        return mask

    def _child(self, node: int, token: int) -> int:
        if (node, token) not in self.children:
            if token in self.eos_ids or not self._permitted(node)[token]:
                return node
            self.children[node, token] = len(self.nodes)
            self.nodes.append((node, token))
        return self.children[node, token]

    def _parser(self, node: int) -> Any:
        """The parser at a node, from the nearest one before it that is kept."""
        path = []
        while node >= len(self.roots) and node not in self.kept:
            parent, token = self.nodes[node]
            path.append((node, token))
            node = parent
        parser = self.roots[node] if node < len(self.roots) else self.kept[node]
        for child, token in reversed(path):
            parser = parser.deep_copy()
            parser.consume_token(token)
            self.kept[child] = parser
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return parser


def make_guide(
    grammars: Sequence[Json | Regex], tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]
) -> Guide:
    """Make the guide of one grammar per row.

    Raises:
        ValueError: llguidance is not installed, or a grammar is not valid.
    """
    distinct = tuple(dict.fromkeys(grammars))
    parsers = _make_parsers(distinct, tokenizer, vocab_size, tuple(eos_ids))
    return Guide(parsers, np.array([distinct.index(grammar) for grammar in grammars], np.int32))


@functools.lru_cache(maxsize=16)  # a compiled program belongs to its parsers
def _make_parsers(
    grammars: tuple[Json | Regex, ...],
    tokenizer: Tokenizer,
    vocab_size: int,
    eos_ids: tuple[int, ...],
) -> Parsers:
    definitions = []
    for grammar in grammars:
        try:
            error = _llguidance().LLMatcher.validate_grammar(grammar.definition)
        except ValueError as problem:
            error = str(problem)
        if error and not error.startswith("WARNING"):
            first = " ".join(error.split())
            raise ValueError(f"{grammar!r} is not a valid grammar: {first}")
        definitions.append(grammar.definition)
    return Parsers(definitions, tokenizer, vocab_size, eos_ids)


def _llguidance() -> Any:  # a module that may be missing
    try:
        import llguidance  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "Json and Regex need the package llguidance: pip install 'paligemma-jax[grammars]'"
        ) from None
    return llguidance
