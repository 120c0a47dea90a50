"""The protocol of samplers, which choose the tokens of all rows in the compiled loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Int32, Key, PyTree

from paligemma_jax.model.constrain import constrain
from paligemma_jax.model.layers import FullFloat
from paligemma_jax.processing.processor import AnyArray

State = TypeVar("State", bound=PyTree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The tokens of B rows so far: pads, prompt (with its `<image>` tokens), answer, free columns.

    So the last n tokens of a row are `tokens[b, length - n : length]`.
    """

    tokens: Int32[Array, "B S"]
    start: Int[Array, " B"]  # column of the first token of a row
    length: Int[Array, ""]  # number of columns in use; the answers start at `length - step`

    @classmethod
    def of_prompts(
        cls, tokens: Int[AnyArray, "B T"], valid: Bool[AnyArray, "B T"], columns: int
    ) -> History:
        """The history before the first token, with room for `columns` in all."""
        order = jnp.argsort(valid, axis=1, stable=True)
        prompts = jnp.take_along_axis(jnp.asarray(tokens, jnp.int32), order, axis=1)
        T = prompts.shape[1]
        start = T - jnp.asarray(valid).sum(axis=1)
        return cls(jnp.pad(prompts, [(0, 0), (0, columns - T)]), start, jnp.int32(T))

    @classmethod
    def empty(cls, rows: int) -> History:
        """A history without columns."""
        return cls(jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.int32(0))

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Which columns are tokens of a row."""
        column = jnp.arange(self.tokens.shape[1])
        return (column >= self.start[:, None]) & (column < self.length)

    def append(self, token: Int[Array, " B"]) -> History:
        """The history after one more token."""
        column, axis = token[:, None], 1
        tokens = jax.lax.dynamic_update_slice_in_dim(self.tokens, column, self.length, axis)
        return replace(self, tokens=tokens, length=self.length + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerContext:
    """What a sampler may read besides the logits and its own state."""

    step: Int[Array, "*B"]  # number of tokens of each answer so far; of each row for `RowSampler`
    keys: Key[Array, " B"]  # one random key per row, from its seed and the step
    history: History  # empty for `Greedy` and `Sample`, which do not read it


@runtime_checkable
class Sampler(Protocol[State]):
    """Chooses the next token of every row: a frozen dataclass with these two methods.

    Both are traced into the compiled programs, which are cached by the sampler; so it must be
    hashable, and its fields are constants. What changes from token to token is its state: any
    pytree of arrays, whose shapes and dtypes stay the same. The first axis of an array is that of
    the rows. Rows must not read each other: then an answer does not depend on its batch.
    """

    def init(self, history: History, vocabulary: int) -> State:
        """Return the state before the first token; None without one.

        Args:
            history: The prompts.
            vocabulary: V, the number of ids.
        """
        ...

    def __call__(
        self, logits: FullFloat[Array, "B V"], context: SamplerContext, state: State
    ) -> tuple[Int32[Array, " B"], State]:
        """Choose one token per row.

        Args:
            logits: Logits for the next token; -inf for the tokens that are not allowed.

        Returns:
            The tokens and the new state. A row that has ended gets a pad, whatever is chosen.
        """
        ...


def is_sampler(value: object) -> bool:
    """Whether a value follows the protocol; a class of samplers does not."""
    return isinstance(value, Sampler) and not isinstance(value, type)


def init_state(
    sampler: Sampler[State], history: History, vocabulary: int, given: State | None = None
) -> State:
    """The first state of a sampler, if none is given, on a mesh with its rows where the batch
    is."""

    def place(x: Array | float) -> Array:
        x = jnp.asarray(x)
        x = x.astype(x.dtype)  # not weakly typed
        return constrain("B", x) if x.shape[:1] == (len(history.tokens),) else x

    state = sampler.init(history, vocabulary) if given is None else given
    return jax.tree.map(place, state)


def choose(
    sampler: Sampler[State], logits: FullFloat[Array, "B V"], context: SamplerContext, state: State
) -> tuple[Int32[Array, " B"], State]:
    """Call a sampler.

    Raises:
        ValueError: Its tokens are not int[B], or its state has changed its type.
    """
    name, rows = type(sampler).__name__, len(logits)
    result = sampler(logits, context, state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{name} must return (tokens, state), got {_describe(result)}")
    tokens, new_state = result
    if not isinstance(tokens, Array) or tokens.dtype.kind not in "iu" or tokens.shape != (rows,):
        raise ValueError(f"{name} must return tokens int32[{rows}], got {_describe(tokens)}")
    if _describe(new_state) != _describe(state):
        raise ValueError(
            f"the state of {name} must keep the structure, shapes and dtypes that init gave it, "
            f"{_describe(state)}, got {_describe(new_state)}"
        )
    return tokens.astype(jnp.int32), new_state


def _describe(tree: PyTree) -> str:
    """The structure of a pytree with the dtypes and shapes of its arrays."""
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree))
