"""Names of releases and what they mean."""

from __future__ import annotations

import pytest

from paligemma_jax.model.numerics import NUMERICS
from paligemma_jax.parity.engines.releases import RELEASES, changes, describe, profile_of


def test_every_profile_has_releases_or_is_another_program():
    assert set(NUMERICS) - set(RELEASES) == {"big_vision", "keras"}


@pytest.mark.parametrize(
    ("version", "profile"),
    [
        ("4.47.1", "transformers-4.47"),
        ("4.51.3", "transformers-4.47"),
        ("4.57.6", "transformers-4.56"),
        ("5.10.4", "transformers-5.9"),
        ("5.23.0", "transformers"),
        ("6.0.0", "transformers"),
    ],
)
def test_a_release_has_a_profile(version, profile):
    assert profile_of(version) == profile


def test_releases_before_paligemma_2_are_refused():
    with pytest.raises(ValueError, match=r"must be 4\.47 or newer for PaliGemma 2, got 4\.41\.0"):
        profile_of("4.41.0")


def test_neighbors_are_one_span():
    assert describe(["transformers-5.0", "transformers-5.4"]) == "transformers 5.0 to 5.8"
    names = ["transformers-4.52", "transformers-5.9", "big_vision"]
    assert describe(names) == "transformers 4.52, 5.9 to 5.22, big_vision"


def test_changes_are_words():
    assert changes("transformers-4.52", "transformers-4.47") == [
        "a final softcap",
        "a final softcap on generated tokens",
    ]
