"""What may be generated: ids or grammars, checked and compiled for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool

from paligemma_jax.grammars.automaton import NEVER, Automaton, compile_grammars
from paligemma_jax.grammars.constraint import Constraint
from paligemma_jax.grammars.grammar import Grammar
from paligemma_jax.grammars.guidance import Json, Regex, make_guide
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.processing.tokenizer import Tokenizer

Ids: TypeAlias = Bool[np.ndarray, "*B V"]
AnyGrammar: TypeAlias = Grammar | Json | Regex
Allowed: TypeAlias = Ids | AnyGrammar | Sequence[AnyGrammar] | Constraint


def compile_allowed(
    allowed: Allowed | None,
    config: PaliGemmaConfig,
    tokenizer: Tokenizer,
    prompts: int,
    max_new_tokens: int,
) -> Ids | Constraint:
    """Return the ids of text that may be generated, or the compiled grammar of each prompt.

    Raises:
        ValueError: Ids are of another shape, the grammars are not one per prompt, or no answer fits
            in `max_new_tokens`.
    """
    if isinstance(allowed, AnyGrammar):
        allowed = [allowed] * prompts
    if isinstance(allowed, list | tuple):
        return _compile(allowed, config, tokenizer, prompts, max_new_tokens)
    ids = np.arange(config.decoder.vocab_size)
    is_text = (ids < tokenizer.vocab_size) & (ids != config.image_token_id)
    if allowed is None:
        return is_text
    allowed = np.asarray(allowed)
    if allowed.dtype != bool or allowed.shape not in (ids.shape, (prompts, len(ids))):
        raise ValueError(
            f"allowed must be a grammar, bool[{len(ids)}] or bool[{prompts}, {len(ids)}], "
            f"got {allowed.dtype}{list(allowed.shape)}"
        )
    if not (allowed & is_text).any(axis=-1).all():
        raise ValueError("allowed must permit at least one token of text")
    return allowed & is_text


def _compile(
    grammars: Sequence[AnyGrammar],
    config: PaliGemmaConfig,
    tokenizer: Tokenizer,
    prompts: int,
    max_new_tokens: int,
) -> Constraint:
    check_prompts(grammars, prompts)
    vocab_size, eos_ids = config.decoder.vocab_size, config.eos_token_ids
    if all(isinstance(grammar, Json | Regex) for grammar in grammars):
        return make_guide(grammars, tokenizer, vocab_size, eos_ids)  # type: ignore[arg-type]
    for grammar in grammars:
        if not isinstance(grammar, Grammar):
            raise ValueError(
                "allowed must have grammars such as Choices(['yes', 'no']), and Json or Regex only "
                f"for all prompts, got {grammar!r}"
            )
    automaton = compile_grammars(grammars, tokenizer, vocab_size, eos_ids)  # type: ignore[arg-type]
    check_length(automaton, max_new_tokens)
    return automaton


def check_prompts(allowed: Allowed | None, prompts: int) -> None:
    """Raise ValueError unless grammars or masks that are one per prompt are as many as prompts."""
    if isinstance(allowed, list | tuple) and len(allowed) != prompts:
        raise ValueError(
            f"allowed must have one grammar per prompt, got {len(allowed)} for {prompts} prompts"
        )
    if isinstance(allowed, np.ndarray) and allowed.ndim == 2 and len(allowed) != prompts:
        raise ValueError(
            f"allowed must have one mask per prompt, got {len(allowed)} for {prompts} prompts"
        )


def check_length(automaton: Automaton, max_new_tokens: int) -> None:
    """Raise ValueError if the shortest answer of a grammar has more tokens."""
    fewest = automaton.distances[automaton.starts].max()
    if fewest > max_new_tokens:
        needed = "no number of tokens is enough" if fewest == NEVER else f"it needs {fewest}"
        raise ValueError(
            f"max_new_tokens must suffice for the shortest answer of a grammar, "
            f"got {max_new_tokens}: {needed}"
        )


def check_least(least: int, allowed: Ids | Constraint, eos_ids: Sequence[int]) -> None:
    """Raise ValueError if an answer of at least `least` tokens before eos need not be possible."""
    if not least:
        return
    if isinstance(allowed, Constraint):
        raise ValueError(
            f"min_new_tokens must be 0 with a grammar, got {least}: "
            "the grammar decides where an answer may end"
        )
    if not np.delete(allowed, list(eos_ids), axis=-1).any(axis=-1).all():
        raise ValueError("allowed must permit a token besides eos if min_new_tokens is not 0")


def rows_of(allowed: Allowed, rows: np.ndarray) -> Allowed:
    """What is allowed for the prompts at the indices `rows`."""
    if isinstance(allowed, Constraint):
        return allowed.for_rows(rows)
    if isinstance(allowed, list | tuple):
        return [allowed[i] for i in rows]
    if isinstance(allowed, np.ndarray) and allowed.ndim == 2:
        return allowed[rows]
    return allowed


def describe(allowed: Allowed | None) -> str | None:
    """A text that tells two values apart."""
    if isinstance(allowed, np.ndarray):
        return np.packbits(allowed).tobytes().hex()
    return None if allowed is None else repr(allowed)
