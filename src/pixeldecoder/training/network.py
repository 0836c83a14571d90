"""A run's configuration in, the network it trains out: with LoRA, frozen where no loss reaches."""

import inspect
from pathlib import Path
from typing import Any

from pixeldecoder.convert import load_folder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.training.config import Lora, Run, load_yaml

LORA_TARGETS = {
    "backbone": r"(patch_blocks|pixel_blocks)\.\d+\.(attn\.(to_qkv|to_out|add_qkv|to_add_out)|compress|expand"
    r"|(text_)?mlp\.(gate_proj|up_proj|down_proj|0|2))",
    "adapter": r"adapter\.(convs\.(0|2|\d+\.block\.[25])|heads\.\d+|pixel_head)",
}


def build_network(config: Run) -> PixelDecoderTransformer2DModel:
    """The network a run starts from, float32.

    Raises:
        ValueError: nothing to start from, or weights that do not fit the architecture.
    """
    if not config.model and config.architecture is None:
        raise ValueError("expected `model` (what to start from) or `architecture` (to start from scratch)")
    start = None
    if config.model:
        folder = Path(config.model)
        if folder.is_dir():
            start = load_folder(folder)
        else:
            start = PixelDecoderPipeline.from_pretrained(config.model).transformer
    if config.architecture is None:
        assert start is not None
        return start.float()
    model = PixelDecoderTransformer2DModel(**read_architecture(config.architecture))
    if start is not None:
        expected, found = model.state_dict(), start.state_dict()
        problems = [n for n in found if n not in expected or expected[n].shape != found[n].shape]
        problems += [n for n in expected if n not in found and not n.startswith("adapter.")]
        if problems:
            raise ValueError(
                f"{config.model} does not fit {config.architecture}: {len(problems)} tensors differ: "
                f"{', '.join(problems[:5])}"
            )
        model.load_state_dict(found, strict=False)
    return model


def read_architecture(path: Path) -> dict[str, Any]:
    """Arguments of the network from JSON or YAML.

    Raises:
        ValueError: unreadable, or an argument that does not exist.
    """
    found = load_yaml(path)  # JSON is YAML
    known = inspect.signature(PixelDecoderTransformer2DModel.__init__).parameters
    found = {key: value for key, value in found.items() if str(key)[:1] != "_" and key != "auto_map"}
    if unknown := [str(key) for key in found if key not in known]:
        raise ValueError(
            f"{path}: expected arguments of the network ({', '.join(list(known)[1:])}), got {', '.join(unknown)[:200]}"
        )
    return found


def add_lora(model: PixelDecoderTransformer2DModel, lora: Lora) -> None:
    """Freeze the network and add low-rank updates, which train."""
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=LORA_TARGETS[lora.part]))


def set_trained(model: PixelDecoderTransformer2DModel, config: Run, aux_rgb: bool, adapter_alone: bool = False) -> None:
    """What of a network trains, and how much of its activations is kept for that.

    Args:
        aux_rgb: the auxiliary head has a loss.
        adapter_alone: unless there is LoRA, which decides by itself.
    """
    if config.lora.rank:
        add_lora(model, config.lora)
    elif adapter_alone:
        model.requires_grad_(False)
        model.adapter.requires_grad_(True)
    freeze_unused(model, aux_rgb)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()


def freeze_unused(model: PixelDecoderTransformer2DModel, aux_rgb: bool) -> None:
    """What no loss reaches: the text branch of the last block, and the auxiliary head if it has no loss."""
    last = model.patch_blocks[-1]
    unused = [last.text.norm2, last.text_mlp, last.attn.to_add_out] if last.text is not None else []
    if model.adapter is not None and model.adapter.aux_rgb_head is not None and not aux_rgb:
        unused.append(model.adapter.aux_rgb_head)
    for module in unused:
        module.requires_grad_(False)
