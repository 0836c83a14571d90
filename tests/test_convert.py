"""Reference checkpoints in every guise, both ways, and files that are none."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from conftest import CASES, Golden, manifests, tiny_model
from pixeldecoder import PixelDecoderTransformer2DModel
from pixeldecoder.convert import (
    config_from_reference,
    convert_reference_state_dict,
    export_reference_state_dict,
    infer_config,
    load_folder,
    save_reference_checkpoint,
)
from pixeldecoder.presets import PRESETS

OPEN = ("latent_channels", "latent_downscale_factor", "scale", "unpack_latents", "adapter_padding_mode")


def split_adaln(state):
    """The repackaged layout: rows (P^2, 6, d) cut after the third of the six."""
    result = {}
    for name, tensor in state.items():
        if name.startswith("pixel_blocks") and ".adaLN_modulation.0." in name:
            block, leaf = name.split(".adaLN_modulation.0.")
            rows = tensor.unflatten(0, (-1, 6, state[f"{block}.norm1.weight"].shape[0]))
            result[f"{block}.adaLN_modulation_msa.{leaf}"] = rows[:, :3].flatten(0, 2).contiguous()
            result[f"{block}.adaLN_modulation_mlp.{leaf}"] = rows[:, 3:].flatten(0, 2).contiguous()
        else:
            result[name] = tensor
    return result


def overrides(golden):
    config = config_from_reference(golden.kwargs)
    return {key: config[key] for key in (*OPEN, "rope_reference_size")}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_for_bit(case, tmp_path):
    golden = Golden(case)
    state = {name: tensor.bfloat16() for name, tensor in golden.state.items()}
    torch.save({f"net.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.pth")
    model = PixelDecoderTransformer2DModel.from_single_file(tmp_path / "model.pth", **overrides(golden))
    assert model.dtype == torch.bfloat16
    assert dict(model.config).items() >= config_from_reference(golden.kwargs).items()
    model.save_pretrained(tmp_path / "diffusers")
    assert_same(export_reference_state_dict(load_folder(tmp_path / "diffusers").state_dict()), state)


@pytest.mark.parametrize("prefix", ["", "core.", "net.", "model.diffusion_model."])
@pytest.mark.parametrize("repackage", [dict, split_adaln])
def test_prefixes_and_layouts(prefix, repackage, tmp_path):
    golden = Golden("v15_flux")
    state = {prefix + name: tensor for name, tensor in repackage(golden.state).items()}
    for extra in ("net_ema.a", "fake_score.b", "discriminator.c", f"{prefix}_repa_projector.d"):
        state[extra] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    model = PixelDecoderTransformer2DModel.from_single_file(tmp_path / "model.safetensors", **overrides(golden))
    assert_same(export_reference_state_dict(model.state_dict()), golden.state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_written_checkpoint_is_the_released_format(suffix, tmp_path):
    golden = Golden("v1_sdxl")
    save_reference_checkpoint(golden.model, tmp_path / f"model{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]
    again = PixelDecoderTransformer2DModel.from_single_file(tmp_path / f"model{suffix}", **overrides(golden))
    assert_same(export_reference_state_dict(again.state_dict()), golden.state)
    if suffix == ".pth":
        names = torch.load(tmp_path / "model.pth", weights_only=True).keys()
        assert names == {f"net.{name}" for name in golden.state}


def test_networks_unknown_to_the_reference_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="velocity"):
        save_reference_checkpoint(tiny_model(text_embed_dim=None, num_layers=1), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"\.pth or \.safetensors"):
        save_reference_checkpoint(tiny_model(), tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(manifests()))
def test_release_is_recognised(name):
    manifest = manifests()[name]
    state = {f"net.{key}": torch.empty(shape, device="meta") for key, shape in manifest["parameters"].items()}
    state = convert_reference_state_dict(state)
    # By its shapes alone, too: released networks of one shape differ in nothing but the latents they were trained on.
    for config in infer_config(state, PRESETS[name]), infer_config(state), PRESETS[name].config:
        with torch.device("meta"):
            model = PixelDecoderTransformer2DModel(**config)
        assert dict(model.config).items() >= config_from_reference(manifest["config"]).items()
        model.load_state_dict(state, strict=True, assign=True)
        assert export_reference_state_dict(model.state_dict()).keys() == manifest["parameters"].keys()


def test_release_name_in_the_path_is_used(tmp_path):
    golden = Golden("v15_flux2")
    name = "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step"
    (tmp_path / name).mkdir()
    torch.save({f"net.{key}": t for key, t in golden.state.items()}, tmp_path / name / "model_ema_bf16.pth")
    model = PixelDecoderTransformer2DModel.from_single_file(tmp_path / name / "model_ema_bf16.pth")
    assert dict(model.config).items() >= config_from_reference(golden.kwargs).items()


def test_prior_without_adapter(tmp_path):
    state = {k: t for k, t in Golden("v1_sdxl").state.items() if not k.startswith("lq_proj")}
    torch.save({f"net.{key}": t for key, t in state.items()}, tmp_path / "PixelDiT_finetune_2kto4k.pth")
    model = PixelDecoderTransformer2DModel.from_single_file(tmp_path / "PixelDiT_finetune_2kto4k.pth")
    assert model.adapter is None and model.config.rope_reference_size == 2048
    torch.save(state, tmp_path / "unnamed.pth")
    with pytest.raises(ValueError, match="rope_reference_size"):
        PixelDecoderTransformer2DModel.from_single_file(tmp_path / "unnamed.pth")


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file was executed')",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p, s: torch.save({k: v for k, v in s.items() if k != "final_layer.norm.weight"}, p),
            "1 missing: norm_out",
        ),
        (
            lambda p, s: torch.save(s | {"patch_blocks.0.attn.bias": torch.zeros(1)}, p),
            "1 unknown tensors: patch_blocks",
        ),
        (
            lambda p, s: torch.save(s | {"final_layer.norm.weight": torch.zeros(9)}, p),
            r"norm_out.weight \(9,\) for \(8,\)",
        ),
        (lambda p, s: torch.save({"unet.weight": torch.zeros(1)}, p), "not a PiD checkpoint"),
        (lambda p, s: torch.save([1, 2], p), "expected named tensors, got list"),
        (lambda p, s: p.write_bytes(b""), "truncated"),
        (lambda p, s: p.write_bytes(pickle.dumps(Code())), "refused"),
        (lambda p, s: torch.save({"a": Code()}, p), "refused"),
        (lambda p, s: (torch.save(s, p), p.write_bytes(p.read_bytes()[:5000])), "model.pth"),
        (lambda p, s: p.write_text("<html>not found</html>"), "refused|not a readable"),
        (lambda p, s: None, "no such file"),
    ],
    ids=["missing", "extra", "shape", "foreign", "list", "empty", "code", "nested code", "truncated", "html", "absent"],
)
def test_bad_file(write, message, tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.pth"
    write(path, golden.state)
    with pytest.raises(ValueError, match=message) as error:
        PixelDecoderTransformer2DModel.from_single_file(path, **overrides(golden))
    assert "model.pth" in str(error.value)


def test_truncated_safetensors(tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.safetensors"
    save_file(golden.state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable"):
        PixelDecoderTransformer2DModel.from_single_file(path, **overrides(golden))


def test_unreleased_network_asks_for_what_is_open(tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.pth"
    torch.save(golden.state, path)
    with pytest.raises(ValueError, match="adapter_padding_mode, rope_reference_size"):
        PixelDecoderTransformer2DModel.from_single_file(path)
    with pytest.raises(ValueError, match='no released checkpoint "nonsense"'):
        PixelDecoderTransformer2DModel.from_single_file(path, preset="nonsense")
