"""Grammars: what an answer may be, as values that compile to one automaton over tokens.

    Sequence([Text("there are "), Choices(["no", "two"]), Text(" cats")])

A text is the tokens that the tokenizer encodes it to, as in the answers that a model is trained on;
no other split of the same text is generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from paligemma_jax.processing.mask_codec import CODES
from paligemma_jax.processing.tokenizer import LOCATIONS, SEGMENTS, Tokenizer

State = int


class Builder(Protocol):
    """What a grammar adds itself to: a nondeterministic automaton (`automaton.Network`)."""

    tokenizer: Tokenizer

    def add_state(self) -> State: ...

    def add_edge(self, start: State, ids: SequenceOf[int], end: State, rises: bool = False) -> None:
        """Go from `start` to `end` with any of the tokens `ids`; with `rises`, only with one above
        the token before the last."""

    def add_jump(self, start: State, end: State) -> None:
        """Go from `start` to `end` without a token."""


class Grammar(ABC):
    """A set of answers. `allowed=` of `DecodingOptions` takes one, or one per prompt."""

    @abstractmethod
    def build(self, network: Builder, start: State) -> State:
        """Add the paths of all answers from `start`. Returns the state where they end."""


@dataclass(frozen=True)
class Text(Grammar):
    """One text."""

    text: str

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text:
            raise ValueError(f"Text must be a non-empty str, got {self.text!r}")

    def build(self, network: Builder, start: State) -> State:
        tokenizer = network.tokenizer
        for token in tokenizer.encode(self.text):
            if not tokenizer.decode([token]):
                raise ValueError(f"Text must not contain special tokens, got {self.text!r}")
            end = network.add_state()
            network.add_edge(start, [token], end)
            start = end
        return start


@dataclass(frozen=True)
class Sequence(Grammar):
    """Grammars one after the other. Each text is tokenized on its own."""

    parts: tuple[Grammar, ...]

    def __post_init__(self):
        object.__setattr__(self, "parts", _grammars("Sequence", self.parts))

    def build(self, network: Builder, start: State) -> State:
        for part in self.parts:
            start = part.build(network, start)
        return start


@dataclass(frozen=True)
class Either(Grammar):
    """One of several grammars."""

    options: tuple[Grammar, ...]

    def __post_init__(self):
        object.__setattr__(self, "options", _grammars("Either", self.options))

    def build(self, network: Builder, start: State) -> State:
        end = network.add_state()
        for option in self.options:
            network.add_jump(option.build(network, start), end)
        return end


@dataclass(frozen=True)
class Repeat(Grammar):
    """A grammar from `least` to `most` times; without `most`, any number of times."""

    part: Grammar
    least: int = 0
    most: int | None = None

    def __post_init__(self):
        _grammars("Repeat", [self.part])
        check_counts("Repeat", self.least, self.most)

    def build(self, network: Builder, start: State) -> State:
        for _ in range(self.least):
            start = self.part.build(network, start)
        if self.most is None:
            again = network.add_state()
            network.add_jump(start, again)
            network.add_jump(self.part.build(network, again), again)
            return again
        end = network.add_state()
        for _ in range(self.most - self.least):
            network.add_jump(start, end)
            start = self.part.build(network, start)
        network.add_jump(start, end)
        return end


@dataclass(frozen=True)
class Choices(Grammar):
    """One of several texts, such as ["yes", "no"]."""

    texts: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "texts", check_texts("Choices", self.texts))

    def build(self, network: Builder, start: State) -> State:
        return Either(tuple(map(Text, self.texts))).build(network, start)


class _Tokens(Grammar):
    """One token out of several."""

    def __init__(self, names: SequenceOf[str], rises: bool = False):
        self.names, self.rises = names, rises

    def build(self, network: Builder, start: State) -> State:
        ids = network.tokenizer.encode("".join(self.names))
        end = network.add_state()
        network.add_edge(start, ids, end, self.rises)
        return end


# Four locations y0 x0 y1 x1, with y0 < y1 and x0 < x1. The last bin cannot start a box.
_BOX = (*[_Tokens(LOCATIONS[:-1])] * 2, *[_Tokens(LOCATIONS[1:], rises=True)] * 2)


@dataclass(frozen=True)
class Boxes(Grammar):
    """An answer to `detect`: boxes with an area, each with one of the labels.

    Args:
        labels: The label or labels.
        least, most: Bounds of the number of boxes. `most=None` sets none.
    """

    labels: tuple[str, ...]
    least: int = 0
    most: int | None = None

    mask = ()  # of each box

    def __post_init__(self):
        name = type(self).__name__
        labels = [self.labels] if isinstance(self.labels, str) else self.labels
        object.__setattr__(self, "labels", check_texts(name, labels))
        for label in self.labels:
            if label != label.strip() or any(c in label for c in ";<"):
                raise ValueError(
                    f"a label of {name} must not contain ; or < or start or end with a space, "
                    f"got {label!r}"
                )
        check_counts(name, self.least, self.most, fewest=1)

    def build(self, network: Builder, start: State) -> State:
        # The text between two boxes is tokenized as one piece.
        box, labels = Sequence((*_BOX, *self.mask)), [f" {label}" for label in self.labels]
        last = Sequence((box, Choices(tuple(labels))))
        other = Sequence((box, Choices(tuple(f"{label} ; " for label in labels))))
        others = max(self.least - 1, 0), None if self.most is None else self.most - 1
        end = Sequence((Repeat(other, *others), last)).build(network, start)
        if not self.least:
            network.add_jump(start, end)
        return end


class Masks(Boxes):
    """An answer to `segment`: boxes with an area, each with the codes of a mask and a label.

    Arguments are those of `Boxes`.
    """

    mask = (_Tokens(SEGMENTS),) * CODES


def check_texts(owner: str, texts: SequenceOf[str]) -> tuple[str, ...]:
    """Return texts as a tuple. ValueError unless they are non-empty texts."""
    is_list = isinstance(texts, list | tuple)
    if not is_list or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{owner} must have a list of non-empty texts, got {texts!r}")
    return tuple(texts)


def check_counts(owner: str, least: int, most: int | None, fewest: int = 0) -> None:
    """Raise ValueError unless 0 <= least <= most and fewest <= most; None is no bound."""
    counts = [least] if most is None else [least, most]
    are_integers = all(type(count) is int for count in counts)
    if not are_integers or not 0 <= least <= counts[-1] or (most is not None and most < fewest):
        raise ValueError(
            f"{owner} must have integers least from 0 to most, and most at least {fewest} or None, "
            f"got least={least!r}, most={most!r}"
        )


def _grammars(owner: str, parts: SequenceOf[Grammar]) -> tuple[Grammar, ...]:
    is_list = isinstance(parts, list | tuple)
    if not is_list or not parts or not all(isinstance(part, Grammar) for part in parts):
        raise ValueError(
            f"{owner} must have grammars, such as Text('yes') or Choices(['a', 'b']), got {parts!r}"
        )
    return tuple(parts)
