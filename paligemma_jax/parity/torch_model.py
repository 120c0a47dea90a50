"""transformers' model, whose modules read their weights when they are called, and what it computes stage by stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convert.checkpoint import Checkpoint
from convert.config import write_config
from convert.huggingface import HEAD, TABLE, canonical_name
from convert.match import pieces
from convert.table import HUGGINGFACE
from convert.tensor import Tensor, from_array
from paligemma_jax.model.config import Numerics
from paligemma_jax.parity.inputs import ParityCase
from paligemma_jax.processing.processor import Inputs

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]

Arrays = Mapping[str, np.ndarray]


def build(checkpoint: Checkpoint, directory: Path | None, dtype: str, keep: bool) -> Any:
    """A PaliGemmaForConditionalGeneration of `dtype` without weights: each module reads its own as it is called, and drops them unless `keep`.

    So the largest tensor is all that is in memory, and what runs is transformers' own code from the first line to the last. The weights are
    those of the checkpoint in the dtype that it has, widened or rounded to `dtype`. Attention is eager, which alone has Gemma 2's softcap.
    directory: whose config.json transformers is to read itself, if there is one; else it gets the config that was read here.
    """
    try:
        import torch
        from transformers import AutoConfig, PaliGemmaForConditionalGeneration
        from transformers import PaliGemmaConfig as Config
        from transformers.initialization import no_init_weights
        from transformers.utils import logging
    except ImportError:
        raise ValueError("to compare with transformers, install the extra: pip install 'paligemma-jax[parity]'") from None
    logging.set_verbosity_error()
    small = checkpoint.nbytes < 2**27
    torch.set_num_threads(1 if small else os.cpu_count() or 1)  # threads wait for each other longer than a small model computes
    theirs = directory if directory is not None and (directory / "config.json").exists() else None
    config = AutoConfig.from_pretrained(theirs) if theirs else Config.from_dict(write_config(checkpoint.config, dtype))
    with no_init_weights():  # allocates, but touches no memory
        model = PaliGemmaForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    model.tie_weights()
    tensors = {p.key: p.there(checkpoint.tensors[p.path]) for p in pieces(HUGGINGFACE[checkpoint.config.decoder.model_type], checkpoint.config)}
    tensors[HEAD] = tensors[TABLE]
    unread = set(tensors)
    for path, module in model.named_modules():
        own = {parameter: canonical_name(f"{path}.{name}") for name, parameter in module._parameters.items() if parameter is not None}
        if own:
            _stream(module, {parameter: tensors[key] for parameter, key in own.items()}, keep)
            unread -= set(own.values())
    assert not unread, f"transformers has no {', '.join(sorted(unread))}"
    return model


def _stream(module: Any, own: dict[Any, Tensor], keep: bool) -> None:
    import torch

    def read(*_: Any) -> None:
        for parameter, tensor in own.items():
            if parameter.numel() == 0:
                parameter.data = as_torch(tensor.load()).to(parameter.dtype)

    def drop(*_: Any) -> None:
        for parameter in own:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    drop()
    module.register_forward_pre_hook(read)
    if not keep:
        module.register_forward_hook(drop)


def adapted(model: Any, numerics: Numerics) -> Any:
    """The model, made to compute what a profile of ours means as far as its config can say it; positions are given with the `batch`."""
    text = model.config.get_text_config()
    if not numerics.sliding_window and getattr(text, "layer_types", None):
        text.layer_types[:] = ["full_attention"] * len(text.layer_types)
    if not numerics.capped_prefill and hasattr(text, "final_logit_softcapping"):
        text.final_logit_softcapping = None
    return model


def batch(inputs: Inputs, numerics: Numerics) -> dict[str, Any]:
    """`inputs` as transformers' forward takes them, with positions that skip pads, as its generate counts them."""
    import torch

    valid = torch.from_numpy(np.array(inputs.valid)).long()
    found = {
        "input_ids": torch.from_numpy(np.array(inputs.tokens)).long(),
        "attention_mask": valid,
        "token_type_ids": torch.from_numpy(np.array(inputs.targets)).long(),
        "position_ids": (valid.cumsum(1) - 1).clamp(min=0) + numerics.first_position,
    }
    if len(inputs.images):
        found["pixel_values"] = torch.from_numpy(np.moveaxis(inputs.images, 3, 1).copy())
    return found


def stages(model: Any, inputs: Inputs, numerics: Numerics, attention: bool, fed: Arrays | None = None) -> dict[str, np.ndarray]:
    """Every stage's output in float32, by the names of `paligemma_jax.model.stages.collect_stages` with its branches.

    fed: by stage, what the model goes on with in the place of its own output, as there.
    """
    import torch

    found: dict[str, np.ndarray] = {}
    with ExitStack() as hooks, torch.no_grad():

        def keep(name: str, value: Any) -> Any:
            found[name] = value.float().numpy()
            return torch.from_numpy(fed[name]).to(value.dtype) if fed and name in fed else value

        def after(module: Any, name: str, weights: str = "") -> None:
            def hook(_module: Any, _inputs: Any, out: Any) -> Any:
                if not isinstance(out, tuple):
                    return keep(name, out)
                if weights:
                    found[weights] = out[1].float().numpy()
                return keep(name, out[0]) if name else out[0], *out[1:]

            handle = module.register_forward_hook(hook)
            hooks.callback(handle.remove)

        _hook(model, after, keep, hooks, attention)
        found["logits"] = model(**batch(inputs, numerics)).logits.float().numpy()
    return found


def _hook(model: Any, after: Any, keep: Any, hooks: ExitStack, attention: bool) -> None:
    """Hooks on all modules whose output is a stage."""
    vision, text = model.model.vision_tower, model.model.language_model
    vision = getattr(vision, "vision_model", vision)

    def patches(_module: Any, _inputs: Any, out: Any) -> Any:  # [M, W, h, w] for our [M, h * w, W]
        kept = keep("vision/patches", out.flatten(2).transpose(1, 2))
        return kept.transpose(1, 2).reshape(out.shape)

    def embeddings(_module: Any, args: Any) -> Any:
        return keep("decoder/embeddings", args[0]), *args[1:]

    hooks.callback(vision.embeddings.patch_embedding.register_forward_hook(patches).remove)
    hooks.callback(text.layers[0].register_forward_pre_hook(embeddings).remove)
    after(vision.embeddings, "vision/embeddings")
    after(vision.post_layernorm, "vision/output")
    after(model.model.multi_modal_projector, "projector")
    after(text.norm, "decoder/norm")
    for tower, layers in (("vision", vision.encoder.layers), ("decoder", text.layers)):
        for i, layer in enumerate(layers):
            name = f"{tower}/layers/{i}"
            post = hasattr(layer, "post_feedforward_layernorm")  # Gemma 2 normalises what it adds to the residual stream
            after(layer.self_attn, "" if post else f"{name}/attention/output", f"{name}/attention/weights" if attention else "")
            after(layer.post_feedforward_layernorm if post else layer.mlp, f"{name}/mlp/output")
            if post:
                after(layer.post_attention_layernorm, f"{name}/attention/output")
            after(layer, name)


def loss(logits: np.ndarray, inputs: Inputs) -> np.ndarray:
    """transformers' loss of its logits, the mean over all targets: float32[1]."""
    import torch

    return _loss(torch.from_numpy(logits), inputs).numpy()[None]


def _loss(logits: Any, inputs: Inputs) -> Any:
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, torch.from_numpy(np.where(inputs.targets, inputs.tokens, -100)).long(), vocab_size=logits.shape[-1])


def gradients(model: Any, case: ParityCase) -> dict[str, np.ndarray]:
    """Of that loss, by our paths and in our layouts; of a model that keeps its weights."""
    numerics, config = case.checkpoint.config.profile, case.checkpoint.config
    _loss(model(**batch(case.inputs, numerics)).logits, case.inputs).backward()
    found = {canonical_name(name): from_array(parameter.grad.numpy()) for name, parameter in model.named_parameters()}
    return {piece.path: piece.here(found[piece.key]).load() for piece in pieces(HUGGINGFACE[config.decoder.model_type], config)}


def greedy(model: Any, inputs: Inputs, numerics: Numerics, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Its greedy tokens int32[B, new], and of each the gap float32[B, new] between the two largest logits."""
    import torch

    given = batch(inputs, numerics)
    del given["position_ids"]  # generate counts them itself
    options = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        out = model.generate(**given, **options)
    best = torch.stack(out.logits, 1).float().topk(2).values
    tokens = out.sequences[:, inputs.tokens.shape[1] :].numpy()
    pad = lambda a: np.pad(a, [(0, 0), (0, new - a.shape[1])])
    return pad(tokens).astype(np.int32), pad((best[..., 0] - best[..., 1]).numpy())


def processed(case: ParityCase) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What transformers' PaliGemmaProcessor makes of the case's images and texts, on PIL: (name, ours, theirs) of every array."""
    from transformers import AddedToken, GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil

    vision, (_, prompts, suffixes) = case.checkpoint.config.vision, case.texts
    tokenizer = GemmaTokenizer.from_pretrained(str(case.directory), local_files_only=True)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in LOCATIONS])  # before <image>, as in the released checkpoints
    pixels: Any = SiglipImageProcessorPil(size={"height": vision.image_size, "width": vision.image_size})
    pixels.image_seq_length = vision.num_patches
    processor: Any = PaliGemmaProcessor(pixels, tokenizer)
    rows = case.processor.rows(*case.texts) if case.processor else []
    opened: Any = [[Image.open(image) for image in row.images] for row in rows]  # type: ignore[arg-type]
    out = processor(opened, prompts, suffix=suffixes, padding=True, padding_side="left", return_tensors="np")
    inputs = case.inputs
    yield "pixels", inputs.images, np.moveaxis(out["pixel_values"], 1, 3)
    for name, found, key in (
        ("ids", inputs.tokens, "input_ids"),
        ("valid", inputs.valid, "attention_mask"),
        ("targets", inputs.targets, "token_type_ids"),
    ):
        yield name, found.astype(np.int32), out[key].astype(np.int32)


def version() -> str:
    import transformers

    return transformers.__version__


def as_torch(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if array.dtype.name == "bfloat16" else torch.from_numpy(array)
