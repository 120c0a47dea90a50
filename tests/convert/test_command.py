"""The command `python -m convert`, and resizing position embeddings."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from support import checkpoint_sources as sources
from support import hf_models
from support.checkpoint_sources import run

from convert import convert, read
from convert.checkpoint import resample


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.huggingface(tmp_path_factory.mktemp("source") / "pg2")


def test_command(source, tmp_path, capsys):
    """The whole way round by the command, verified; what it prints."""
    code, out, err = run(capsys, source, tmp_path / "jax", "--to", "jax", "--verify")
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}/jax: jax, {len(read(source).tensors)} tensors, {read(source).nbytes / 1e6:.1f} MB, verified\n"
    assert run(capsys, tmp_path / "jax", tmp_path / "a.npz", "--to", "big_vision", "--dtype", "bfloat16")[0] == 0
    code, out, err = run(
        capsys, tmp_path / "a.npz", tmp_path / "hf", "--to", "huggingface", "--config", source / "config.json", "--max-shard-size", "0.1MB"
    )
    assert code == 0 and err.startswith("note: 50 rows") and len(list((tmp_path / "hf").glob("model-0*.safetensors"))) > 2
    code, out, _ = run(capsys, "inspect", tmp_path / "hf", "--json")
    assert code == 0 and json.loads(out)["dtypes"] == {"bfloat16": len(read(source).tensors)}
    code, out, _ = run(capsys, "inspect", tmp_path / "jax")
    assert "format      jax\n" in out and "odd         its shapes are those of no published" in out


@pytest.mark.parametrize(
    "size, told", [("5G", "not a size like 5GB"), ("2Gi", "not a size"), ("-1", "not a size"), ("0", "one byte"), ("1MB", "jax has none")]
)
def test_shard_sizes(source, tmp_path, capsys, size, told):
    """1 MB would do for safetensors."""
    code, _, err = run(capsys, source, tmp_path / "jax", "--to", "jax", f"--max-shard-size={size}")
    assert code == 2 and told in err and not (tmp_path / "jax").exists()


def test_progress(source, tmp_path, capsys, monkeypatch):
    """Bytes and time left, on a terminal only."""
    assert run(capsys, source, tmp_path / "a", "--to", "jax")[2] == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    _, _, err = run(capsys, source, tmp_path / "b", "--to", "jax", "--verify")
    size = f"{read(source).nbytes / 1e6:.2f}M" if read(source).nbytes > 1e6 else f"{read(source).nbytes / 1e3:.0f}k"
    assert "writing" in err and "verifying" in err and f"{size}/{size}" in err and "B/s" in err and "100%" in err


def test_dry_run(source, tmp_path, capsys):
    code, out, _ = run(capsys, source, tmp_path / "a", "--to", "jax", "--dtype", "float16", "--dry-run")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and not (tmp_path / "a").exists()
    tensors = read(source).tensors
    assert [line[0] for line in lines[:-1]] == list(tensors) and all(line[-2] == "float16" for line in lines[:-1])
    assert sum(int(line[-1].replace(",", "")) for line in lines[:-1]) == sum(tensor.nbytes for tensor in tensors.values()) // 2


@pytest.mark.parametrize("old, new", [(4, 8), (16, 32), (16, 64), (3, 7)])
def test_enlarging_is_scipys_zoom(old, new):
    """big_vision `resample_posemb`: scipy.ndimage.zoom of order 1."""
    from scipy.ndimage import zoom

    table = np.random.default_rng(0).standard_normal((old * old, 6)).astype(np.float32)
    expected = zoom(table.reshape(old, old, 6), (new / old, new / old, 1), order=1)
    np.testing.assert_allclose(resample(table, new * new), expected.reshape(new * new, 6), atol=2e-6)
    assert resample(table, old * old).tobytes() == table.tobytes()


@pytest.mark.parametrize("old, new", [(32, 16), (64, 16), (7, 3), (8, 1)])
def test_shrinking_is_antialiased(old, new):
    """Each new point is a mean: constants and ramps stay, corners stay on corners' means, noise is damped where zoom would keep it."""
    ramp = np.stack(np.meshgrid(np.linspace(-1, 1, old), np.linspace(-1, 1, old), indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    small = resample(np.concatenate([ramp, np.ones((old * old, 1), np.float32)], 1), new * new).reshape(new, new, 3)
    np.testing.assert_allclose(small[..., 2], 1, rtol=1e-6)
    assert np.abs(small[..., :2].mean((0, 1))).max() < 1e-6
    inner = small[1:-1, 1:-1, :2]  # at the edges the triangle is cut off
    np.testing.assert_allclose(inner[..., 0], np.broadcast_to(np.linspace(-1, 1, new)[1:-1, None], inner.shape[:2]), atol=3e-3)
    noise = np.random.default_rng(0).standard_normal((old * old, 50)).astype(np.float32)
    step = (old - 1) / max(1, new - 1)
    assert resample(noise, new * new).std() < 0.9 / step**0.5


def test_resolution(source, tmp_path):
    """Every file says the new size, and the model runs at it, here and in transformers."""
    from support.hf_processor import save_processor, train_tokenizer

    from paligemma_jax.checkpoints.load import load_model

    start = sources.huggingface(tmp_path / "a")
    train_tokenizer(start / "tokenizer.model", vocabulary=400)
    save_processor(start, 56, 14)
    convert(start, tmp_path / "b", "huggingface", resolution=112, verify=True)
    config, processor = (json.loads((tmp_path / "b" / name).read_text()) for name in ("config.json", "processor_config.json"))
    assert config["vision_config"]["image_size"] == 112
    assert processor["image_processor"]["size"] == {"height": 112, "width": 112} and processor["image_processor"]["image_seq_length"] == 64
    theirs = hf_models.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    inputs = hf_models.random_inputs(theirs)
    found = sources.logits(load_model(tmp_path / "b"), inputs)
    np.testing.assert_allclose(found[inputs.valid], hf_models.hf_logits(theirs, inputs)[inputs.valid], atol=2e-4)
    for size in (100, -14, 0):
        with pytest.raises(ValueError, match=f"resolution {size} is not a multiple of the patch size 14"):
            convert(start, tmp_path / "c", "jax", resolution=size)
