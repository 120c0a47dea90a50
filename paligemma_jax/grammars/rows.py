"""Automata whose rows come and go: their tables are data of one program.

The tables of the automata in use are one after another in one table, and a row has the number and
the first state of its own. A row's position is counted from its first state, so the tables may be
arranged anew between two tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int

from paligemma_jax.grammars.automaton import LARGEST, REFUSED, Automaton, Position
from paligemma_jax.grammars.constraint import Constraint
from paligemma_jax.processing.processor import AnyArray

STATES, KINDS = 1024, 64  # of the first table: most sets of grammars fit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowAutomata(Constraint):
    """An automaton for each row, out of G; the first permits all tokens."""

    kinds: Int[AnyArray, "G V"]  # the kind of each token
    table: Int[
        AnyArray, "S C"
    ]  # state and kind -> next state from the automaton's first, or REFUSED
    distances: Int[AnyArray, " S"]  # as in `Automaton`
    rises: Bool[AnyArray, " S"]
    numbers: Int[AnyArray, " B"]  # the automaton of each row
    firsts: Int[AnyArray, " B"]  # its first state

    def begin(self) -> Position:
        return begin(len(self.numbers))

    def permitted(self, position: Position, left: Int[Array, "*B"]) -> Bool[Array, "B V"]:
        """Tokens after which the answer can end within its limit."""
        first, kinds = jnp.asarray(self.firsts), jnp.asarray(self.kinds)[self.numbers]
        kinds = kinds.astype(jnp.int32)
        following = jnp.asarray(self.table)[first + position.state]
        ends = jnp.asarray(self.distances)[first[:, None] + following] < left[..., None]
        permitted = (following != REFUSED) & ends
        permitted = jnp.take_along_axis(permitted, kinds, axis=1, mode="clip")
        above = jnp.arange(kinds.shape[1]) > position.last[:, :1]
        rises = jnp.asarray(self.rises)[first + position.state][:, None]
        return permitted & (above | ~rises)

    def advance(self, position: Position, token: Int[Array, " B"]) -> Position:
        kind = jnp.asarray(self.kinds)[self.numbers, token]
        state = jnp.asarray(self.table)[self.firsts + position.state, kind]
        return position.after(state, token)

    def for_rows(self, rows: Int[AnyArray, " Q"]) -> RowAutomata:
        return replace(self, numbers=self.numbers[rows], firsts=self.firsts[rows])


def begin(rows: int) -> Position:
    """The position of rows in the first state of their automata."""
    return Position(jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 2), jnp.int32))


def automaton_of_ids(ids: Bool[np.ndarray, " V"]) -> Automaton:
    """The automaton of one state that permits the tokens `ids`, at any time."""
    table, zero = np.array([[REFUSED, 0]], np.int32), np.zeros(1, np.int32)
    return Automaton(ids.astype(np.uint8), table, zero, np.zeros(1, bool), starts=zero)


class AutomatonTables:
    """The tables of the automata in use, and of as many used before as have room.

    They are on the devices, and their size is fixed until it does not suffice; a larger one is
    another program.

    Args:
        rows: Number of automata that may be in use together.
        vocab_size: Number of logits, V.
        mesh: The mesh of the model, if it has one.
    """

    def __init__(self, rows: int, vocab_size: int, mesh: Mesh | None = None):
        self.count, self.mesh, self.shape = rows + 1, mesh, (STATES, KINDS)
        self.everything = automaton_of_ids(np.ones(vocab_size, bool))
        self.kept: OrderedDict[int, Automaton] = OrderedDict()  # by identity, last used last
        self.places: dict[int, tuple[int, int]] = {}  # number and first state of each
        self.tables: RowAutomata | None = None

    def fit(self, automata: Iterable[Automaton | None]) -> bool:
        """Whether automata can be in use together; one always can."""
        used = {id(a): a for a in automata if a is not None}
        states, kinds = self._size(used.values())
        return len(used) <= 1 or states * kinds <= LARGEST

    def of(self, rows: Sequence[Automaton | None]) -> RowAutomata | None:
        """The automata of rows; None permits all tokens. None if no row has one.

        Args:
            rows: Automata for which `fit` holds, with one start state, which is 0.
        """
        used = {id(a): a for a in rows if a is not None}
        if not used:
            return None
        for key, automaton in used.items():
            self.kept[key] = automaton
            self.kept.move_to_end(key)
        if self.tables is None or not used.keys() <= self.places.keys():
            self._drop(used)
            self._arrange()
        assert self.tables is not None
        places = [self.places[id(a)] if a is not None else (0, 0) for a in rows]
        numbers, firsts = np.array(places, np.int32).T
        return replace(self.tables, numbers=numbers, firsts=firsts)

    def _drop(self, used: dict[int, Automaton]) -> None:
        """Forget automata that are not in use and have no room, the least recently used first."""
        for key in [key for key in self.kept if key not in used]:
            states, kinds = self._size(self.kept.values())
            fits = states <= self.shape[0] and kinds <= self.shape[1]
            if fits and len(self.kept) < self.count:
                break
            del self.kept[key]
        needed = self._size(self.kept.values())
        larger = max(needed[0], self.shape[0]), max(needed[1], self.shape[1])
        self.shape = larger if larger[0] * larger[1] <= LARGEST else needed

    def _size(self, automata: Iterable[Automaton]) -> tuple[int, int]:
        """The number of states and kinds that the tables of automata need, as powers of two."""
        shapes = [a.table.shape for a in (self.everything, *automata)]
        states, kinds = sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        return 1 << (states - 1).bit_length(), 1 << (kinds - 1).bit_length()

    def _arrange(self) -> None:
        states, kinds_count = self.shape
        kinds_type = np.min_scalar_type(kinds_count - 1)
        kinds = np.zeros((self.count, len(self.everything.kinds)), kinds_type)
        table = np.full(self.shape, REFUSED, np.int32)
        distances, rises = np.zeros(states, np.int32), np.zeros(states, bool)
        first, self.places = 0, {}
        for number, automaton in enumerate((self.everything, *self.kept.values())):
            own = slice(first, first + len(automaton.table))
            kinds[number] = automaton.kinds
            table[own, : automaton.table.shape[1]] = automaton.table
            distances[own], rises[own] = automaton.distances, automaton.rises
            self.places[id(automaton)] = number, first
            first = own.stop
        none, put = np.zeros(0, np.int32), self._put
        self.tables = RowAutomata(put(kinds), put(table), put(distances), put(rises), none, none)

    def _put(self, array: np.ndarray) -> Array:
        """An array on all devices."""
        return jax.device_put(array, self.mesh and NamedSharding(self.mesh, PartitionSpec()))
