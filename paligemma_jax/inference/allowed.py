"""What may be generated: ids or grammars, checked and compiled for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool

from paligemma_jax.grammars.automaton import NEVER, compile_grammars
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
    if len(grammars) != prompts:
        raise ValueError(
            f"allowed must have one grammar per prompt, got {len(grammars)} for {prompts} prompts"
        )
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
    fewest = automaton.distances[automaton.starts].max()
    if fewest > max_new_tokens:
        needed = "no number of tokens is enough" if fewest == NEVER else f"it needs {fewest}"
        raise ValueError(
            f"max_new_tokens must suffice for the shortest answer of a grammar, "
            f"got {max_new_tokens}: {needed}"
        )
    return automaton


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
