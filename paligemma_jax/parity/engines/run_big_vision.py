"""Run big_vision's own model on a job. Needs a checkout of google-research/big_vision and what that
imports (jax, flax, einops, ml_collections, orbax-checkpoint, tensorflow), but not this project.

    python run_big_vision.py JOB

A job is that of `run_transformers.py`, with the checkout as `directory`, its checkpoint as
checkpoint.npz, and the sizes of the model as config.json. big_vision has one call only. It knows no
image tokens: it places one image before each row's text, and pads at its end. Its table has rows
for text only, so that V is the id of the image token.

The result is outputs.npz: the stages that big_vision returns by name, labels/logits
float32[B, T, V] with targets as the causal part, and with `new` tokens, those of its functions for
decoding: tokens int32[B, new], prefill float32[B, V] and decode float32[B, new - 1, V].
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

VARIANTS = ("gemma_2b", "gemma2_2b", "gemma2_9b", "gemma2_27b")


def build(config: dict, rows: int):
    """big_vision's model and its config, for the sizes of a Hugging Face config.json."""
    import ml_collections  # pyright: ignore[reportMissingImports]
    from big_vision.models.proj.paligemma import paligemma  # pyright: ignore[reportMissingImports]

    vision = config["vision_config"]
    model_config = ml_collections.ConfigDict(
        {
            "img": {
                "width": vision["hidden_size"],
                "depth": vision["num_hidden_layers"],
                "mlp_dim": vision["intermediate_size"],
                "num_heads": vision["num_attention_heads"],
                "patch_size": (vision["patch_size"],) * 2,
                "pool_type": "none",
                "scan": True,
            },
            # big_vision's cache is in bfloat16 unless another dtype is given.
            "llm": {
                "variant": variant(config["text_config"]),
                "vocab_size": rows,
                "cache_dtype": "float32",
            },
        }
    )
    return paligemma.Model(**model_config.to_dict()), model_config


def variant(text: dict) -> str:
    """The name of big_vision's decoder of these sizes, which is added to its table if it has
    none."""
    from big_vision.models.ppp import gemma  # pyright: ignore[reportMissingImports]

    second = text.get("model_type") == "gemma2"
    heads, width = text["num_attention_heads"], text["hidden_size"]
    by_width = second and text["query_pre_attn_scalar"] != text["head_dim"]
    sizes = {
        "width": width,
        "depth": text["num_hidden_layers"],
        "mlp_dim": text["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": text["num_key_value_heads"],
        "head_dim": text["head_dim"],
        "query_pre_attn_norm": "rsqrt_emb_per_head" if by_width else "rsqrt_head_dim",
        "final_logits_softcap": (second and text["final_logit_softcapping"]) or 0.0,
        "attn_logits_softcap": (second and text["attn_logit_softcapping"]) or 0.0,
        "post_norms": second,
    }
    defaults = {name: gemma.Model.__dataclass_fields__[name].default for name in sizes}
    for name in VARIANTS:
        known = gemma.get_config(name)
        if all(known.get(key, defaults[key]) == value for key, value in sizes.items()):
            return name
    other = gemma.get_config(VARIANTS[second])
    other.update(sizes)
    gemma.get_config = lambda variant: other.copy_and_resolve_references()
    return VARIANTS[second]


def forward(model, params, batch) -> dict[str, np.ndarray]:
    """The stages of a teacher-forced pass, in order, and the logits of image and text. (The model
    itself returns those of the text.)"""
    call = jax.jit(lambda p, *args: model.apply({"params": p}, *args))
    text_logits, out = call(params, batch["image"], batch["text"], batch["mask_ar"])
    head = jax.jit(
        lambda p, x: model.apply({"params": p}, x, method=lambda m, x: m._llm.compute_logits(x))
    )
    logits = head(params, out["llm/pre_logits"])
    if not np.allclose(logits[:, -text_logits.shape[1] :], text_logits, atol=1e-4):
        raise SystemExit("the model's logits are not those of its last stage")
    layers = out["img/encoder"]
    blocks = sorted(name for name in layers if name.startswith("block"))
    stages = {f"vision/layers/{i}": layers[name]["+mlp"] for i, name in enumerate(blocks)}
    stages |= {"vision/output": out["img/encoded"], "projector": out["img/zimg"]}
    depth = params["llm"]["layers"]["pre_attention_norm"]["scale"].shape[0]
    stages |= {f"decoder/layers/{depth - 1}": out["llm/encoded"]}
    stages |= {"decoder/norm": out["llm/pre_logits"], "logits": logits}
    return {name: np.asarray(value, np.float32) for name, value in stages.items()}


def generate(model, params, batch, new: int, eos: list[int]) -> dict[str, np.ndarray]:
    """Greedy tokens, with the functions that big_vision's decoding runs for each step."""
    from big_vision.trainers.proj.paligemma import predict_fns  # pyright: ignore[reportMissingImports]

    prefill = jax.jit(partial(predict_fns._prefill_cache, model=model, max_decode_len=new))
    extend = jax.jit(partial(predict_fns._extend_cache, model=model))
    last, cache = prefill(params, batch)
    logits = [np.asarray(last[:, 0])]
    tokens = [choose(logits[0], eos)]
    while len(tokens) < new:
        last, cache = extend(params, cache, jnp.asarray(tokens[-1][:, None]))
        logits.append(np.asarray(last[:, 0]))
        tokens.append(choose(logits[-1], eos))
    steps = np.stack(logits, axis=1)
    return {"tokens": np.stack(tokens, axis=1), "prefill": steps[:, 0], "decode": steps[:, 1:]}


def choose(logits: np.ndarray, eos: list[int]) -> np.ndarray:
    """The most likely tokens that do not end the answer."""
    allowed = logits.copy()
    allowed[:, eos] = -np.inf
    return allowed.argmax(axis=-1).astype(np.int32)


def batch_of(inputs, prefix: str, count: int) -> dict[str, jax.Array]:
    """big_vision's inputs: text after the `count` tokens of the image, with pads at the end."""
    tokens, valid, targets = (
        inputs[f"{prefix}{name}"][:, count:] for name in ("tokens", "valid", "targets")
    )
    return {
        "image": jnp.asarray(inputs["images"]),
        "text": jnp.asarray(tokens),
        "mask_input": jnp.asarray(valid, bool),
        # 1 is causal. So no token attends to the pads after it.
        "mask_ar": jnp.asarray(targets | ~valid, jnp.int32),
    }


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    sys.path.insert(0, job["directory"])
    from big_vision.models.proj.paligemma import paligemma  # pyright: ignore[reportMissingImports]

    model, model_config = build(config, config["image_token_index"])
    loaded = paligemma.load(None, str(folder / "checkpoint.npz"), model_config)
    params = jax.tree.map(lambda x: jnp.asarray(x, job["dtype"]), loaded)
    vision = config["vision_config"]
    count = (vision["image_size"] // vision["patch_size"]) ** 2
    stages = forward(model, params, batch_of(inputs, "", count))
    outputs = {f"labels/{name}": value for name, value in stages.items()}
    if job["new"]:
        prompts = batch_of(inputs, "prompt_", count)
        outputs |= generate(model, params, prompts, job["new"], job["eos"])
    np.savez(folder / "outputs.npz", **outputs)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
