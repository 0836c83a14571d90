"""The reference's checkpoint in, our tensors and configuration out, and back: names change, numbers do not."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pixeldecoder.errors import blaming, naming
from pixeldecoder.files import in_utf8, read_json, read_tensors, write_whole
from pixeldecoder.models.folder import check_fit, listing
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.presets import PRESETS, Preset, find_preset

logger = logging.get_logger(__name__)

SETTINGS = "pixeldecoder"
"""Key of the metadata in which a `.safetensors` file keeps the network's arguments and the pipeline's settings."""

# Reference name, our name. `*` stands for a block's number; a name that ends in a dot is a prefix.
_NAMES = [
    ("y_pos_embedding", "text_embed.positions"),
    ("y_embedder.", "text_embed."),
    ("s_embedder.proj.", "patch_embed."),
    ("t_embedder.mlp.0.", "time_embed.linear_1."),
    ("t_embedder.mlp.2.", "time_embed.linear_2."),
    ("patch_blocks.*.adaLN_modulation_img.0.", "patch_blocks.*.image.adaln."),
    ("patch_blocks.*.norm_x1.", "patch_blocks.*.image.norm1."),
    ("patch_blocks.*.norm_x2.", "patch_blocks.*.image.norm2."),
    ("patch_blocks.*.adaLN_modulation_txt.0.", "patch_blocks.*.text.adaln."),
    ("patch_blocks.*.norm_y1.", "patch_blocks.*.text.norm1."),
    ("patch_blocks.*.norm_y2.", "patch_blocks.*.text.norm2."),
    ("patch_blocks.*.attn.qkv_x.", "patch_blocks.*.attn.to_qkv."),
    ("patch_blocks.*.attn.q_norm_x.", "patch_blocks.*.attn.norm_q."),
    ("patch_blocks.*.attn.k_norm_x.", "patch_blocks.*.attn.norm_k."),
    ("patch_blocks.*.attn.proj_x.", "patch_blocks.*.attn.to_out."),
    ("patch_blocks.*.attn.qkv_y.", "patch_blocks.*.attn.add_qkv."),
    ("patch_blocks.*.attn.q_norm_y.", "patch_blocks.*.attn.norm_added_q."),
    ("patch_blocks.*.attn.k_norm_y.", "patch_blocks.*.attn.norm_added_k."),
    ("patch_blocks.*.attn.proj_y.", "patch_blocks.*.attn.to_add_out."),
    ("patch_blocks.*.mlp_x.w1.", "patch_blocks.*.mlp.gate_proj."),
    ("patch_blocks.*.mlp_x.w3.", "patch_blocks.*.mlp.up_proj."),
    ("patch_blocks.*.mlp_x.w2.", "patch_blocks.*.mlp.down_proj."),
    ("patch_blocks.*.mlp_y.w1.", "patch_blocks.*.text_mlp.gate_proj."),
    ("patch_blocks.*.mlp_y.w3.", "patch_blocks.*.text_mlp.up_proj."),
    ("patch_blocks.*.mlp_y.w2.", "patch_blocks.*.text_mlp.down_proj."),
    ("pixel_embedder.proj.", "pixel_embed."),
    ("pixel_blocks.*.adaLN_modulation.0.", "pixel_blocks.*.adaln."),
    ("pixel_blocks.*.norm1.", "pixel_blocks.*.norm1."),
    ("pixel_blocks.*.norm2.", "pixel_blocks.*.norm2."),
    ("pixel_blocks.*.compress_to_attn.", "pixel_blocks.*.compress."),
    ("pixel_blocks.*.attn.qkv.", "pixel_blocks.*.attn.to_qkv."),
    ("pixel_blocks.*.attn.q_norm.", "pixel_blocks.*.attn.norm_q."),
    ("pixel_blocks.*.attn.k_norm.", "pixel_blocks.*.attn.norm_k."),
    ("pixel_blocks.*.attn.proj.", "pixel_blocks.*.attn.to_out."),
    ("pixel_blocks.*.expand_from_attn.", "pixel_blocks.*.expand."),
    ("pixel_blocks.*.mlp.fc1.", "pixel_blocks.*.mlp.0."),
    ("pixel_blocks.*.mlp.fc2.", "pixel_blocks.*.mlp.2."),
    ("final_layer.norm.", "norm_out."),
    ("final_layer.linear.", "proj_out."),
    ("lq_proj.latent_proj.", "adapter.convs."),
    ("lq_proj.output_heads.", "adapter.heads."),
    ("lq_proj.pit_head.", "adapter.pixel_head."),
    ("lq_proj.gate_modules.*.log_alpha", "adapter.sigma_gates.*.log_alpha"),
    ("lq_proj.gate_modules.*.content_proj.", "adapter.sigma_gates.*.proj."),
    ("pit_lq_gate.log_alpha", "adapter.pixel_sigma_gate.log_alpha"),
    ("pit_lq_gate.content_proj.", "adapter.pixel_sigma_gate.proj."),
    ("lq_proj.lq_aux_rgb_head.0.", "adapter.aux_rgb_head.norm."),
    ("lq_proj.lq_aux_rgb_head.1.", "adapter.aux_rgb_head.proj_in."),
    ("lq_proj.lq_aux_rgb_head.3.", "adapter.aux_rgb_head.proj_out."),
]


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\*", r"(\d+)") + ("" if source.endswith(".") else "$")
    return re.compile(pattern), target.replace("*", r"\1")


_TO_OURS = [_rule(reference, ours) for reference, ours in _NAMES]
_TO_REFERENCE = [_rule(ours, reference) for reference, ours in _NAMES]


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        if match := pattern.match(name):
            return match.expand(target) + name[match.end() :]
    return None


def config_from_reference(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's constructor arguments as keyword arguments of `PixelDecoderTransformer2DModel`."""
    has_latents = bool(kwargs.get("lq_latent_channels"))
    config = {
        "patch_size": kwargs["patch_size"],
        "num_layers": kwargs["patch_depth"],
        "num_attention_heads": kwargs["num_groups"],
        "attention_head_dim": kwargs["hidden_size"] // kwargs["num_groups"],
        "num_pixel_layers": kwargs["pixel_depth"],
        "pixel_dim": kwargs["pixel_hidden_size"],
        "num_pixel_attention_heads": kwargs["pixel_num_groups"],
        "pixel_attention_head_dim": kwargs["pixel_attn_hidden_size"] // kwargs["pixel_num_groups"],
        "text_embed_dim": kwargs["txt_embed_dim"],
        "max_text_length": kwargs["txt_max_length"],
        "latent_channels": kwargs["lq_latent_channels"] if has_latents else None,
        "rope_reference_size": kwargs["rope_ref_h"],
    }
    if has_latents:
        aux_rgb_block = kwargs["lq_aux_rgb_head_latent_block_idx"]  # from 1; 0 and less: the last features
        config |= {
            "latent_downscale_factor": kwargs["latent_spatial_down_factor"],
            "scale": kwargs["sr_scale"],
            "adapter_dim": kwargs["lq_hidden_dim"],
            "num_adapter_layers": kwargs["lq_num_res_blocks"],
            "adapter_padding_mode": kwargs["lq_conv_padding_mode"],
            "injection_interval": kwargs["lq_interval"],
            "unpack_latents": kwargs["lq_latent_unpatchify_factor"] == 2,
            "per_channel_gate": kwargs["lq_gate_type"].endswith("_per_dim"),
            "inject_pixels": kwargs["pit_lq_inject"],
            "aux_rgb": kwargs["lq_aux_rgb_head"],
            "aux_rgb_block": aux_rgb_block - 1 if aux_rgb_block > 0 else -1,
        }
    return config


def convert_reference_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reference tensors, under any of the known prefixes and adaLN layouts, under this library's names.

    Tensors that serve training alone (`net_ema.`, `fake_score.`, `discriminator.`, `_repa_projector`) are left out.

    Raises:
        ValueError: the tensors are not those of a PiD network; the message lists the unknown names.
    """
    state = _canonical(state_dict)
    converted = {name: _rename(name, _TO_OURS) for name in state}
    if unknown := [name for name, ours in converted.items() if ours is None]:
        raise ValueError(f"not a PiD checkpoint: {len(unknown)} unknown tensors: {listing(unknown)}")
    # The reference's only scalars have one dimension here.
    ours = {new: state[name].reshape(state[name].shape or (1,)) for name, new in converted.items() if new is not None}
    for name in [n for n in ours if _PIXEL_ADALN.match(n)]:
        block, leaf = name.split(".adaln.")
        rows = (
            ours.pop(name).unflatten(0, (-1, 6, *_shape(ours, f"{block}.norm1.weight", 1))).transpose(0, 1)
        )  # (6, P^2, d)
        ours[f"{block}.adaln_in.{leaf}"], ours[f"{block}.adaln_out.{leaf}"] = (
            part.flatten(0, 2).contiguous() for part in rows.split((2, 4))
        )
    return ours


def export_reference_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse: this library's tensors under the reference's names, without prefix, each adaLN in one tensor."""
    state_dict = dict(state_dict)
    for name in [n for n in state_dict if ".adaln_in." in n]:
        block, leaf = name.split(".adaln_in.")
        parts = [state_dict.pop(f"{block}.{part}.{leaf}") for part in ("adaln_in", "adaln_out")]
        width = _shape(state_dict, f"{block}.norm1.weight", 1)[0]
        rows = torch.cat([part.unflatten(0, (count, -1, width)) for part, count in zip(parts, (2, 4), strict=True)])
        state_dict[f"{block}.adaln.{leaf}"] = rows.transpose(0, 1).flatten(0, 2)
    exported = {name: _rename(name, _TO_REFERENCE) for name in state_dict}
    if unknown := [name for name, reference in exported.items() if reference is None]:
        raise ValueError(f"the reference has no name for {len(unknown)} tensors: {listing(unknown)}")
    return {
        reference: state_dict[name].reshape(() if name.endswith("log_alpha") else state_dict[name].shape)
        for name, reference in exported.items()
        if reference is not None
    }


def infer_config(state_dict: Mapping[str, torch.Tensor], preset: Preset | None = None, **overrides) -> dict[str, Any]:
    """Constructor arguments from tensor shapes; what shapes do not tell comes from `preset` or `overrides`.

    Shapes do not tell scale, VAE factor, packing, padding and the rotary reference. Without preset and overrides they
    are taken from the released network of the same adapter width (512: v1, 1024: v1.5) and number of latent channels.

    Args:
        state_dict: under this library's names, from `convert_reference_state_dict`.
        preset: of the release that the tensors are from.
        overrides: arguments of `PixelDecoderTransformer2DModel` that are known better.

    Raises:
        ValueError: not a PiD network, or no released network is like it and something is left open.
    """
    config = _infer_backbone(state_dict)
    if "adapter.convs.0.weight" not in state_dict:
        if preset is None and "rope_reference_size" not in overrides:
            raise ValueError(
                "the rotary reference size of a prior cannot be told from its tensors: "
                "give the release name or rope_reference_size"
            )
        return config | (preset.config if preset else {}) | overrides

    adapter_dim, cells = _shape(state_dict, "adapter.convs.0.weight", 4)[:2]
    heads = _count(state_dict, r"adapter\.heads\.(\d+)\.")
    if not heads:
        raise ValueError("not a PiD checkpoint: its adapter has no heads")
    config |= {
        "adapter_dim": adapter_dim,
        "num_adapter_layers": _count(state_dict, r"adapter\.convs\.(\d+)\.block"),
        "injection_interval": -(-config["num_layers"] // heads),
        "per_channel_gate": _shape(state_dict, "adapter.sigma_gates.0.proj.weight", 2)[0] > 1,
        "inject_pixels": "adapter.pixel_head.weight" in state_dict,
        "aux_rgb": "adapter.aux_rgb_head.norm.weight" in state_dict,
    }
    preset = preset or _released_like(adapter_dim, cells)
    if preset is not None:
        parameters = inspect.signature(PixelDecoderTransformer2DModel).parameters
        config |= {name: preset.config.get(name, parameters[name].default) for name in _NOT_IN_SHAPES}
    elif left_open := [name for name in _NOT_IN_SHAPES if name not in overrides]:
        raise ValueError(
            f"no released network has an adapter of width {adapter_dim} on {cells} channels, and these cannot be told "
            f"from the tensors: {', '.join(left_open)}. Give them as arguments, or a release name"
        )
    return config | overrides


_NOT_IN_SHAPES = (
    "latent_channels", "latent_downscale_factor", "scale", "unpack_latents", "adapter_padding_mode",
    "rope_reference_size",
)  # fmt: skip


def _infer_backbone(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of a network without latents."""
    dim, patch_numel = _shape(state_dict, "patch_embed.weight", 2)
    attn_dim, pixel_numel = _shape(state_dict, "pixel_blocks.0.compress.weight", 2)
    head_dim = _shape(state_dict, "patch_blocks.0.attn.norm_q.weight", 1)[0]
    pixel_head_dim = _shape(state_dict, "pixel_blocks.0.attn.norm_q.weight", 1)[0]
    patch_size = math.isqrt(patch_numel // 3)
    if patch_size < 1:
        raise ValueError(f"not a PiD checkpoint: tensor patch_embed.weight has shape {(dim, patch_numel)}")
    config: dict[str, Any] = {
        "patch_size": patch_size,
        "num_layers": _count(state_dict, r"patch_blocks\.(\d+)\."),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_pixel_layers": _count(state_dict, r"pixel_blocks\.(\d+)\."),
        "pixel_dim": pixel_numel // patch_size**2,
        "num_pixel_attention_heads": attn_dim // pixel_head_dim,
        "pixel_attention_head_dim": pixel_head_dim,
        "text_embed_dim": None,
        "latent_channels": None,
    }
    if "text_embed.proj.weight" in state_dict:
        config["text_embed_dim"] = _shape(state_dict, "text_embed.proj.weight", 2)[1]
        config["max_text_length"] = _shape(state_dict, "text_embed.positions", 3)[1]
    return config


def _shape(state_dict: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in state_dict:
        raise ValueError(f"not a PiD checkpoint: it has no tensor {name}")
    shape = state_dict[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"not a PiD checkpoint: tensor {name} has shape {tuple(shape)}")
    return shape


def _count(state_dict: Mapping[str, torch.Tensor], pattern: str) -> int:
    """Different numbers in the names that match."""
    return len({match.group(1) for name in state_dict if (match := re.match(pattern, name))})


def _released_like(adapter_dim: int, cells: int) -> Preset | None:
    """By the adapter's width and its input channels."""
    for preset in PRESETS.values():
        if preset.latent_space is None:  # pixels are all it knows
            continue
        channels = preset.config.get("latent_channels", 16) // (4 if preset.config.get("unpack_latents") else 1)
        if preset.config.get("adapter_dim", 512) == adapter_dim and channels == cells:
            return preset
    return None


def load_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a `.pth`, `.pt` or `.safetensors` file as they are.

    Raises:
        ValueError: as `read_tensors`, or something else than named tensors.
    """
    state = read_tensors(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a checkpoint: expected named tensors, got {type(state).__name__}")
    return state


def read_reference(
    path: str | Path, preset: str | None = None, **overrides
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a reference checkpoint under this library's names, and the arguments of their network.

    Raises:
        ValueError: an unreadable file, or as `infer_config`.
    """
    state = convert_reference_state_dict(load_checkpoint(path))
    written = {} if preset else read_settings(path).get("network", {})
    return state, infer_config(state, find_preset(path, preset), **(written | overrides))


def load_reference_model(
    path: str | Path, preset: str | None = None, dtype: torch.dtype | None = None, **overrides
) -> PixelDecoderTransformer2DModel:
    """A checkpoint in the reference's format, `.pth` or `.safetensors`, as a model.

    What `save_reference_checkpoint` wrote beside the tensors is used, unless a preset is named.

    Raises:
        ValueError: an unreadable file, or missing or unexpected tensors, which the message lists.
    """
    with naming(path), blaming(f"{path} could not be loaded"):
        state, config = read_reference(path, preset, **overrides)
        model = _network(config, state, path)
    return model if dtype is None else model.to(dtype)


def load_folder(path: str | Path) -> PixelDecoderTransformer2DModel:
    """The network in a diffusers folder, of a pipeline or its own, each tensor in the dtype it is stored in.

    (`from_pretrained` casts to one dtype, which would not give back what was converted.)

    Raises:
        ValueError: the folder holds no such network.
    """
    path = Path(path)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    shards = sorted(path.glob("*.safetensors"))
    if not shards or not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a diffusers folder with config.json and .safetensors files")
    config = {k: v for k, v in read_json(path / "config.json").items() if k[:1] != "_" and k != "auto_map"}
    with naming(path), blaming(f"{path} could not be loaded"):
        state = {name: tensor for shard in shards for name, tensor in load_checkpoint(shard).items()}
        return _network(config, state, path)


def _network(
    config: dict[str, Any], state: dict[str, torch.Tensor], source: str | Path
) -> PixelDecoderTransformer2DModel:
    """A network of these arguments and tensors, which must be all of its own."""
    check_arguments(PixelDecoderTransformer2DModel, config, source)
    with torch.device("meta"):
        model = PixelDecoderTransformer2DModel(**config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_fit(
        source,
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        of_another_shape=[
            f"{name} {tuple(state[name].shape)} for {tuple(size)}"
            for name, size in expected.items()
            if name in state and state[name].shape != size
        ],
    )
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], source: str | Path) -> None:
    """Refuse settings from a file that a class of this version does not take.

    Raises:
        ValueError: they are listed.
    """
    if unknown := sorted(set(arguments) - set(inspect.signature(function).parameters)):
        raise ValueError(f"{source}: settings that this version of pixeldecoder does not know: {listing(unknown)}")


def folder_to_reference(folder: str | Path, path: str | Path) -> None:
    """Write the network in a diffusers folder as a reference checkpoint, and warn of what the file has no place for.

    A `.safetensors` file keeps the pipeline's settings and scheduler as metadata, and
    `PixelDecoderPipeline.from_single_file` finds them there; a `.pth` file holds tensors alone.

    Raises:
        ValueError: as `load_folder` and `save_reference_checkpoint`.
    """
    path, settings, left_out = Path(path), {}, []
    if (index := Path(folder) / "model_index.json").is_file():
        entries = {k: v for k, v in read_json(index).items() if k[:1] != "_"}
        components = {name for name, value in entries.items() if isinstance(value, list)}
        left_out = [k for k in sorted(components - {"transformer", "scheduler"}) if entries[k][0] is not None]
        scheduler = read_json(Path(folder) / "scheduler" / "scheduler_config.json")
        settings = {"pipeline": {k: entries[k] for k in entries if k not in components}, "scheduler": scheduler}
    save_reference_checkpoint(load_folder(folder), path, settings)
    if path.suffix == ".pth" and settings:
        lost = [f"{key} {value}" for key, value in settings["pipeline"].items() if value not in (None, "")]
        left_out += [*lost, f"scheduler {settings['scheduler']['_class_name']}"]
    if left_out:
        keep = " (a .safetensors file keeps the settings)" if path.suffix == ".pth" else ""
        logger.warning(f"{path}: left out, as the format has no place for it: {', '.join(left_out)}{keep}")


def save_reference_checkpoint(
    model: PixelDecoderTransformer2DModel, path: str | Path, settings: Mapping[str, Any] | None = None
) -> None:
    """Write the reference's format, `.pth` or `.safetensors`, under the released files' prefix `net.`.

    Args:
        model: to write.
        path: of the file.
        settings: beside the network's own arguments, kept as metadata of a `.safetensors` file, for `read_settings`.

    Raises:
        ValueError: another suffix, or a network that the reference cannot run.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path}: the reference's format is .pth or .safetensors, got {path.suffix!r}")
    if model.config.prediction_type != "velocity" or model.config.text_embed_dim is None:
        raise ValueError("the reference knows only networks with text that predict the velocity")
    state = {f"net.{name}": t.contiguous() for name, t in export_reference_state_dict(model.state_dict()).items()}
    network = {key: value for key, value in model.config.items() if key[:1] != "_"}
    metadata = {SETTINGS: json.dumps({"network": network, **(settings or {})})}
    if path.suffix == ".safetensors":
        write_whole(path, lambda file: save_file(state, file, metadata))
    else:
        write_whole(path, lambda file: torch.save(state, file))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings that `save_reference_checkpoint` wrote beside the tensors: "network", the arguments of the model, and
    for a pipeline "pipeline", its own arguments, and "scheduler", the configuration of its scheduler.

    Raises:
        ValueError: an unreadable file, or something else in that place.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with in_utf8(path) as named, safe_open(named, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        raise ValueError(f"{path}: its settings (metadata {SETTINGS!r}) are not readable") from None
    if not isinstance(settings, dict) or not all(isinstance(part, dict) for part in settings.values()):
        raise ValueError(f"{path}: its settings (metadata {SETTINGS!r}) are not what this library writes")
    return settings


def pipeline_settings(path: str | Path) -> dict[str, Any]:
    """Arguments of the pipeline, its scheduler among them, that `folder_to_reference` wrote into a checkpoint.

    Raises:
        ValueError: as `read_settings`, or no such scheduler.
    """
    settings = read_settings(path)
    if "pipeline" not in settings:
        return {}
    config = settings.get("scheduler", {})
    scheduler: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)
    if not is_scheduler:
        raise ValueError(f"{path}: diffusers has no scheduler {config.get('_class_name')!r}")
    with blaming(f"{path}: its scheduler"):
        return {"scheduler": scheduler.from_config(config), **settings["pipeline"]}


_PIXEL_ADALN = re.compile(r"pixel_blocks\.\d+\.adaln\.")
_PREFIXES = ("model.diffusion_model.", "core.", "net.")
_TRAINING_ONLY = re.compile(r"^(net_ema|fake_score|discriminator)\.|_repa_projector")


def _canonical(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without prefix, no tensors that serve training alone, and each pixel block's adaLN in one tensor."""
    state = {}
    for name, tensor in state_dict.items():
        if _TRAINING_ONLY.search(name):
            continue
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        state[name.removeprefix(prefix)] = tensor
    # Repackaged files cut each pixel block's adaLN, rows ordered (P^2, 6, d), after the third of the six.
    for name in [n for n in state if ".adaLN_modulation_msa." in n]:
        partner = name.replace("_msa.", "_mlp.")
        if partner not in state:
            raise ValueError(f"not a PiD checkpoint: {name} has no {partner} beside it")
        msa, mlp = state.pop(name), state.pop(partner)
        block = name.split(".adaLN")[0]
        width = _shape(state, f"{block}.norm1.weight", 1)[0]
        halves = [half.unflatten(0, (-1, 3, width)) for half in (msa, mlp)]
        joined = torch.cat(halves, dim=1).flatten(0, 2)
        leaf = name.rsplit(".", 1)[1]
        state[f"{block}.adaLN_modulation.0.{leaf}"] = joined
    return state
