"""The command `paligemma-jax convert`, and resizing position embeddings."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from support import checkpoint_sources as sources
from support import hf_models
from support.checkpoint_sources import run
from support.paths import ROOT

from convert import convert, read
from convert.checkpoint import resample


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.huggingface(tmp_path_factory.mktemp("source") / "pg2")


def test_every_format_in_turn(source, tmp_path, capsys):
    """Converts from Hugging Face through all formats and back, and checks the output."""
    code, out, err = run(capsys, source, tmp_path / "jax", "--to", "jax", "--verify")
    checkpoint = read(source)
    count, size = len(checkpoint.tensors), f"{checkpoint.nbytes / 1e6:.1f} MB"
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}/jax: jax, {count} tensors, {size}, verified\n"
    npz = tmp_path / "a.npz"
    options = ("--to", "big_vision", "--dtype", "bfloat16")
    assert run(capsys, tmp_path / "jax", npz, *options)[0] == 0
    options = ("--config", source / "config.json", "--max-shard-size", "0.1MB")
    code, out, err = run(capsys, npz, tmp_path / "hf", "--to", "huggingface", *options)
    assert code == 0 and err.startswith("note: 50 missing rows")
    assert len(list((tmp_path / "hf").glob("model-0*.safetensors"))) > 2
    code, out, _ = run(capsys, "inspect", tmp_path / "hf", "--json")
    assert code == 0 and json.loads(out)["dtypes"] == {"bfloat16": count}
    code, out, _ = run(capsys, "inspect", tmp_path / "jax")
    assert "format      jax\n" in out
    assert "notes       its shapes match no published PaliGemma" in out


@pytest.mark.parametrize("module", [["paligemma_jax", "convert"], ["convert"]])
def test_both_modules_run_the_same_command(source, module):
    command = [sys.executable, "-m", *module, "inspect", str(source), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["format"] == "huggingface"
    command = [sys.executable, "-m", *module, str(source), "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = "paligemma-jax: --to is required: jax, huggingface or big_vision\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    "size,message",
    [
        ("5G", "must be a size like 5GB, got '5G'"),
        ("2Gi", "must be a size"),
        ("-1", "must be a size"),
        ("0", "at least 1 byte"),
        ("1MB", "jax has none"),
    ],
)
def test_shard_sizes_are_checked(source, tmp_path, capsys, size, message):
    """1MB would be valid for safetensors."""
    flag = f"--max-shard-size={size}"
    code, _, err = run(capsys, source, tmp_path / "jax", "--to", "jax", flag)
    assert code == 2 and message in err and not (tmp_path / "jax").exists()


def test_progress_bars_have_bytes_and_speed(source, tmp_path, capsys, monkeypatch):
    """Bars appear on a terminal; elsewhere short conversions print no progress."""
    assert run(capsys, source, tmp_path / "a", "--to", "jax")[2] == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    _, _, err = run(capsys, source, tmp_path / "b", "--to", "jax", "--verify")
    nbytes = read(source).nbytes
    size = f"{nbytes / 1e6:.2f}M" if nbytes > 1e6 else f"{nbytes / 1e3:.0f}k"
    assert "writing" in err and "verifying" in err and f"{size}/{size}" in err
    assert "B/s" in err and "100%" in err


def test_progress_lines_in_a_log(source, tmp_path, capsys, monkeypatch):
    """Without a terminal, a line every so often has the bytes, the speed and the time left."""
    from paligemma_jax.data import progress

    defaults = progress.progress_bar.__kwdefaults__ | {"interval": 0.0}
    monkeypatch.setattr(progress.progress_bar, "__kwdefaults__", defaults)
    _, _, err = run(capsys, source, tmp_path / "a", "--to", "jax", "--verify")
    lines = err.splitlines()
    assert lines[0].startswith("writing: ") and lines[-1].startswith("verifying: ")
    assert all("B/s" in line and "left" in line for line in lines)


def test_dry_run_lists_the_tensors(source, tmp_path, capsys):
    options = ("--to", "jax", "--dtype", "float16", "--dry-run")
    code, out, _ = run(capsys, source, tmp_path / "a", *options)
    *lines, _ = [line.split() for line in out.splitlines()]
    assert code == 0 and not (tmp_path / "a").exists()
    checkpoint = read(source)
    assert [line[0] for line in lines] == list(checkpoint.tensors)
    assert all(line[-2] == "float16" for line in lines)
    assert sum(int(line[-1].replace(",", "")) for line in lines) == checkpoint.nbytes // 2


@pytest.mark.parametrize("old,new", [(4, 8), (16, 32), (16, 64), (3, 7)])
def test_enlarging_is_scipys_zoom(old, new):
    """big_vision `resample_posemb`: scipy.ndimage.zoom of order 1."""
    from scipy.ndimage import zoom

    table = np.random.default_rng(0).standard_normal((old * old, 6)).astype(np.float32)
    expected = zoom(table.reshape(old, old, 6), (new / old, new / old, 1), order=1)
    resized = resample(table, new * new)
    np.testing.assert_allclose(resized, expected.reshape(new * new, 6), atol=2e-6)
    assert resample(table, old * old).tobytes() == table.tobytes()


@pytest.mark.parametrize("old,new", [(32, 16), (64, 16), (7, 3), (8, 1)])
def test_shrinking_is_antialiased(old, new):
    """Each new point is a mean: constants and ramps are kept, and noise is damped, unlike with
    zoom."""
    axis, new_axis = np.linspace(-1, 1, old), np.linspace(-1, 1, new)
    ramp = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    table = np.concatenate([ramp, np.ones((old * old, 1), np.float32)], 1)
    small = resample(table, new * new).reshape(new, new, 3)
    np.testing.assert_allclose(small[..., 2], 1, rtol=1e-6)
    assert np.abs(small[..., :2].mean((0, 1))).max() < 1e-6
    inner = small[1:-1, 1:-1, 0]  # at the edges the triangle is cut off
    expected = np.broadcast_to(new_axis[1:-1, None], inner.shape)
    np.testing.assert_allclose(inner, expected, atol=3e-3)
    noise = np.random.default_rng(0).standard_normal((old * old, 50)).astype(np.float32)
    step = (old - 1) / max(1, new - 1)
    assert resample(noise, new * new).std() < 0.9 / step**0.5


def test_resolution(source, tmp_path):
    """Every file has the new size, and the model runs at it, here and in transformers."""
    from support.hf_processor import save_processor, train_tokenizer

    from paligemma_jax.checkpoints.load import load_model

    start, resized = sources.huggingface(tmp_path / "a"), tmp_path / "b"
    train_tokenizer(start / "tokenizer.model", vocabulary=400)
    save_processor(start, 56, 14)
    convert(start, resized, "huggingface", resolution=112, verify=True)
    config = json.loads((resized / "config.json").read_text())
    processor = json.loads((resized / "processor_config.json").read_text())["image_processor"]
    assert config["vision_config"]["image_size"] == 112
    assert processor["size"] == {"height": 112, "width": 112}
    assert processor["image_seq_length"] == 64
    theirs = hf_models.PaliGemmaForConditionalGeneration.from_pretrained(
        resized, attn_implementation="eager"
    ).eval()
    inputs = hf_models.random_inputs(theirs)
    ours, expected = (
        sources.logits(load_model(resized), inputs),
        hf_models.hf_logits(theirs, inputs),
    )
    np.testing.assert_allclose(ours[inputs.valid], expected[inputs.valid], atol=2e-4)
    for size in (100, -14, 0):
        message = f"resolution must be a multiple of the patch size 14, got {size}"
        with pytest.raises(ValueError, match=message):
            convert(start, tmp_path / "c", "jax", resolution=size)
