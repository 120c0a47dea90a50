"""Compile grammars to a deterministic automaton over tokens, and follow it in a compiled loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Int32

from paligemma_jax.grammars.constraint import Constraint
from paligemma_jax.grammars.grammar import Grammar, State
from paligemma_jax.processing.processor import AnyArray
from paligemma_jax.processing.tokenizer import Tokenizer

REFUSED = -1
NEVER = 2**30  # the distance of a state from which no answer ends
LARGEST = 2**26  # entries of a table: 256 MiB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Position:
    """Where rows are in an automaton."""

    state: Int32[Array, " rows"]
    last: Int32[Array, "rows 2"]  # the last two tokens

    def after(self, state: Int[Array, " rows"], token: Int[Array, " rows"]) -> Position:
        """The position after a token, which leads to `state` or is REFUSED."""
        state = jnp.where(state == REFUSED, self.state, state)
        last = jnp.stack([self.last[:, 1], token], axis=1)
        return Position(state.astype(jnp.int32), last.astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Automaton(Constraint):
    """A deterministic automaton over tokens.

    Tokens that no state distinguishes have the same kind, so that the table is small: the 1,024
    locations have three.
    """

    kinds: Int[AnyArray, " V"]  # the kind of each token
    table: Int[AnyArray, "S C"]  # state and kind -> next state, or REFUSED
    distances: Int[AnyArray, " S"]  # fewest tokens that complete an answer, eos included
    rises: Bool[AnyArray, " S"]  # whether the next token must be above the one before the last
    starts: Int[AnyArray, " B"]  # the first state of each row

    def begin(self) -> Position:
        starts = jnp.asarray(self.starts, jnp.int32)
        return Position(starts, jnp.zeros((len(starts), 2), jnp.int32))

    def permitted(self, position: Position, left: Int[Array, ""]) -> Bool[Array, "rows V"]:
        """Tokens after which the answer can end within its limit."""
        following = jnp.asarray(self.table)[position.state]
        ends = jnp.asarray(self.distances)[following] < left
        permitted = ((following != REFUSED) & ends)[:, jnp.asarray(self.kinds)]
        above = jnp.arange(len(self.kinds)) > position.last[:, :1]
        rises = jnp.asarray(self.rises)[position.state][:, None]
        return permitted & (above | ~rises)

    def advance(self, position: Position, token: Int[Array, " rows"]) -> Position:
        state = jnp.asarray(self.table)[position.state, jnp.asarray(self.kinds)[token]]
        return position.after(state, token)

    def for_rows(self, rows: Int[AnyArray, " B"]) -> Automaton:
        return replace(self, starts=self.starts[rows])


@dataclass
class Network:
    """A nondeterministic automaton: edges with sets of tokens, and jumps without a token."""

    tokenizer: Tokenizer
    edges: list[list[tuple[int, State]]] = field(default_factory=list)  # set of tokens, end
    jumps: list[list[State]] = field(default_factory=list)
    rises: list[bool] = field(default_factory=list)
    sets: dict[tuple[int, ...], int] = field(default_factory=dict)  # tokens -> their number

    def add_state(self) -> State:
        self.edges.append([])
        self.jumps.append([])
        self.rises.append(False)
        return len(self.edges) - 1

    def add_edge(self, start: State, ids: Sequence[int], end: State, rises: bool = False) -> None:
        number = self.sets.setdefault(tuple(ids), len(self.sets))
        self.edges[start].append((number, end))
        self.rises[start] |= rises

    def add_jump(self, start: State, end: State) -> None:
        self.jumps[start].append(end)

    def closure(self, states: set[State]) -> frozenset[State]:
        """The states, and all that jumps lead to."""
        reached, waiting = set(states), list(states)
        while waiting:
            for state in self.jumps[waiting.pop()]:
                if state not in reached:
                    reached.add(state)
                    waiting.append(state)
        return frozenset(reached)

    def rises_after(self, states: frozenset[State]) -> bool:
        """Whether the next token must rise: of all states with edges, or of none."""
        rules = {self.rises[state] for state in states if self.edges[state]}
        if len(rules) > 1:
            raise ValueError(
                "a grammar must not have a box and another text of <loc> tokens as alternatives"
            )
        return rules == {True}


def compile_grammars(
    grammars: Sequence[Grammar], tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]
) -> Automaton:
    """Compile one grammar per row to one automaton, in which each grammar has a start state.

    Args:
        vocab_size: Number of logits, V.
        eos_ids: Tokens that end an answer.

    Raises:
        ValueError: A grammar has no answer, or the table would be too large.
    """
    network = Network(tokenizer)
    starts: dict[Grammar, State] = {}
    end = network.add_state()
    for grammar in dict.fromkeys(grammars):
        starts[grammar] = network.add_state()
        network.add_edge(grammar.build(network, starts[grammar]), eos_ids, end)
    network.add_edge(end, eos_ids, end)
    kinds, members = _token_kinds(list(network.sets), vocab_size)
    numbers, rows = _determinize(network, list(starts.values()), members)
    shape = _padded(len(rows)), _padded(int(kinds.max()) + 1)
    if shape[0] * shape[1] > LARGEST:
        raise ValueError(
            f"a grammar must have at most {LARGEST:,} transitions, got {len(rows):,} states x "
            f"{kinds.max() + 1:,} kinds of tokens: use fewer or shorter texts"
        )
    table = np.full(shape, REFUSED, np.int32)
    for state, row in enumerate(rows):
        table[state, list(row.keys())] = list(row.values())
    rises = np.zeros(shape[0], bool)
    for states, number in numbers.items():
        rises[number] = network.rises_after(states)
    distances = _distances(rows, numbers[network.closure({end})], shape[0])
    first = {grammar: numbers[network.closure({start})] for grammar, start in starts.items()}
    return Automaton(kinds, table, distances, rises, np.array([first[g] for g in grammars]))


def _token_kinds(
    sets: Sequence[Sequence[int]], vocab_size: int
) -> tuple[Int32[np.ndarray, " V"], list[list[int]]]:
    """Number the tokens by the sets that contain them. Returns the kind of each token, 0 for one
    in no set, and the kinds that make up each set."""
    membership = defaultdict(list)
    for number, ids in enumerate(sets):
        for token in ids:
            membership[token].append(number)
    signatures: dict[tuple[int, ...], int] = {(): 0}
    kinds = np.zeros(vocab_size, np.int32)
    for token, numbers in membership.items():
        kinds[token] = signatures.setdefault(tuple(numbers), len(signatures))
    members: list[list[int]] = [[] for _ in sets]
    for signature, kind in signatures.items():
        for number in signature:
            members[number].append(kind)
    return kinds, members


def _determinize(
    network: Network, starts: Sequence[State], members: list[list[int]]
) -> tuple[dict[frozenset[State], int], list[dict[int, int]]]:
    """Subset construction. Returns the number of each set of states, and for each number the next
    one by kind of token."""
    numbers: dict[frozenset[State], int] = {}
    order: list[frozenset[State]] = []
    rows: list[dict[int, int]] = []

    def number_of(states: set[State]) -> int:
        closed = network.closure(states)
        if closed not in numbers:
            numbers[closed] = len(numbers)
            order.append(closed)
        return numbers[closed]

    for start in starts:
        number_of({start})
    for states in order:  # which grows meanwhile
        targets: dict[int, set[State]] = defaultdict(set)
        for state in states:
            for number, end in network.edges[state]:
                for kind in members[number]:
                    targets[kind].add(end)
        rows.append({kind: number_of(ends) for kind, ends in targets.items()})
    return numbers, rows


def _distances(rows: list[dict[int, int]], end: int, size: int) -> Int32[np.ndarray, " S"]:
    """The number of tokens on the shortest path from each state to `end`."""
    distances = np.full(size, NEVER, np.int32)
    before = defaultdict(set)
    for state, row in enumerate(rows):
        for following in row.values():
            before[following].add(state)
    distances[end], waiting = 0, [end]
    for state in waiting:
        for earlier in before[state]:
            if distances[earlier] == NEVER:
                distances[earlier] = distances[state] + 1
                waiting.append(earlier)
    return distances


def _padded(size: int) -> int:
    """A power of two, so that most grammars share one compiled program."""
    return 1 << max(size - 1, 15).bit_length()
