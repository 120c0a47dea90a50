"""The handwritten digits, and how they are bent."""

import numpy as np
import pytest

from paligemma_jax.tiny import digits

pytest.importorskip("sklearn")

FIRST_HELD_OUT = [2, 2, 0, 8, 7, 8, 3, 4]


def test_the_split_is_fixed_and_without_overlap():
    (train, train_labels), (held_out, held_out_labels) = digits.scans(False), digits.scans(True)
    assert len(held_out) == digits.HELD_OUT and len(train) + len(held_out) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in held_out}
    assert set(train_labels) == set(held_out_labels) == set(range(10))
    assert held_out_labels[:8].tolist() == FIRST_HELD_OUT


def test_bent_copies_keep_their_labels():
    plain, bent = digits.glyphs(held_out=True), digits.glyphs(held_out=True, copies=2)
    assert bent.labels.tolist() == plain.labels.tolist() * 2
    copies = bent.alpha[: len(plain.alpha)]
    same = np.abs(copies - plain.alpha).mean((1, 2))
    different = np.abs(copies - np.roll(plain.alpha, 1, axis=0)).mean((1, 2))
    assert 0.01 < same.mean() < 0.6 * different.mean()
