"""What the decoding loop asks of a compiled grammar."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jax import Array
from jaxtyping import Bool, Int, PyTree

from paligemma_jax.processing.processor import AnyArray


class Constraint(ABC):
    """A compiled grammar for each row: a pytree, whose methods run in a compiled loop.

    A position says where the rows are in their grammars. It is a pytree of arrays [rows, ...].
    """

    @abstractmethod
    def begin(self) -> PyTree:
        """The position before the first token."""

    @abstractmethod
    def permitted(self, position: PyTree, left: Int[Array, "*rows"]) -> Bool[Array, "rows V"]:
        """Whether each token may follow, if `left` more tokens may come, this one included. Every
        row has one that may. `left` is that of each row only in `RowAutomata`."""

    @abstractmethod
    def advance(self, position: PyTree, token: Int[Array, " rows"]) -> PyTree:
        """The position after a token. A row that has ended stays where it is."""

    @abstractmethod
    def for_rows(self, rows: Int[AnyArray, " Q"]) -> Constraint:
        """The constraint of these rows."""
