"""What each row of an engine may generate, as an automaton."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from paligemma_jax.grammars.automaton import Automaton, compile_grammars
from paligemma_jax.grammars.grammar import Grammar
from paligemma_jax.grammars.rows import automaton_of_ids
from paligemma_jax.inference.allowed import Allowed, check_least, check_length, compile_allowed
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.processing.tokenizer import Tokenizer

KEPT = 64  # compiled grammars; others are compiled again when their request gets a row


def has_automaton(allowed: Allowed | None) -> bool:
    """Whether an engine's rows can follow this: ids, or grammars but `Json` and `Regex`."""
    several = allowed if isinstance(allowed, list | tuple) else [allowed]
    return all(one is None or isinstance(one, np.ndarray | Grammar) for one in several)


def row_automaton(
    options: DecodingOptions, config: PaliGemmaConfig, tokenizer: Tokenizer
) -> Automaton | None:
    """The automaton of one prompt's answers, the same object for equal grammars as long as it is
    kept; None if all text is allowed.

    Raises:
        ValueError: Ids are of another shape, there are several grammars, or no answer fits in
            `max_new_tokens`.
    """
    allowed, eos_ids = options.allowed, config.eos_token_ids
    if allowed is None:
        return None
    if isinstance(allowed, list | tuple) and len(allowed) == 1:
        (allowed,) = allowed
    if isinstance(allowed, Grammar):
        automaton = _compiled(allowed, tokenizer, config.decoder.vocab_size, tuple(eos_ids))
        check_length(automaton, options.max_new_tokens)
        check_least(options.min_new_tokens, automaton, eos_ids)
        return automaton
    ids = compile_allowed(allowed, config, tokenizer, 1, options.max_new_tokens)
    check_least(options.min_new_tokens, ids, eos_ids)
    return _of_ids(np.asarray(ids).tobytes())


@lru_cache(maxsize=KEPT)
def _compiled(
    grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]
) -> Automaton:
    return compile_grammars([grammar], tokenizer, vocab_size, eos_ids)


@lru_cache(maxsize=KEPT)
def _of_ids(ids: bytes) -> Automaton:
    return automaton_of_ids(np.frombuffer(ids, bool))
