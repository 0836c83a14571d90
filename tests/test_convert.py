"""Reference checkpoints in every guise, both ways, and files that are none."""

import json
import pickle

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchLCMScheduler
from safetensors.torch import load_file, save_file

from conftest import CASES, TINY, TINY_V15, Golden, manifests, tiny_model
from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel, TinyLatentEncoder
from pixeldecoder.convert import (
    config_from_reference,
    convert_reference_state_dict,
    export_reference_state_dict,
    folder_to_reference,
    infer_config,
    load_folder,
    load_reference_model,
    save_reference_checkpoint,
)
from pixeldecoder.presets import PRESETS
from pixeldecoder.sampler import teacher_scheduler

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
    model = load_reference_model(tmp_path / "model.pth", **overrides(golden))
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
    model = load_reference_model(tmp_path / "model.safetensors", **overrides(golden))
    assert_same(export_reference_state_dict(model.state_dict()), golden.state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_written_checkpoint_is_the_released_format(suffix, tmp_path):
    golden = Golden("v1_sdxl")
    save_reference_checkpoint(golden.model, tmp_path / f"model{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]
    again = load_reference_model(tmp_path / f"model{suffix}", **overrides(golden))
    assert_same(export_reference_state_dict(again.state_dict()), golden.state)
    if suffix == ".pth":
        names = torch.load(tmp_path / "model.pth", weights_only=True).keys()
        assert names == {f"net.{name}" for name in golden.state}


def test_networks_unknown_to_the_reference_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="velocity"):
        save_reference_checkpoint(tiny_model(**TINY | dict(text_embed_dim=None, num_layers=1)), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"\.pth or \.safetensors"):
        save_reference_checkpoint(tiny_model(), tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


def test_loaded_in_another_dtype(tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.pth"
    torch.save(golden.state, path)
    for dtype in torch.float32, torch.bfloat16:
        pipeline = PixelDecoderPipeline.from_pretrained(path, torch_dtype=dtype, **overrides(golden))
        assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {dtype}
        assert not pipeline.transformer.training


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
    model = load_reference_model(tmp_path / name / "model_ema_bf16.pth")
    assert dict(model.config).items() >= config_from_reference(golden.kwargs).items()


def test_prior_without_adapter(tmp_path):
    state = {k: t for k, t in Golden("v1_sdxl").state.items() if not k.startswith("lq_proj")}
    torch.save({f"net.{key}": t for key, t in state.items()}, tmp_path / "PixelDiT_finetune_2kto4k.pth")
    model = load_reference_model(tmp_path / "PixelDiT_finetune_2kto4k.pth")
    assert model.adapter is None and model.config.rope_reference_size == 2048
    torch.save(state, tmp_path / "unnamed.pth")
    with pytest.raises(ValueError, match="rope_reference_size"):
        load_reference_model(tmp_path / "unnamed.pth")


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
        (
            lambda p, s: torch.save(s | {"s_embedder.proj.weight": torch.zeros(8, 1)}, p),
            r"not a PiD checkpoint: tensor patch_embed.weight has shape \(8, 1\)",
        ),
        (
            lambda p, s: torch.save(s | {"patch_blocks.0.attn.q_norm_x.weight": torch.zeros(0)}, p),
            r"not a PiD checkpoint: tensor patch_blocks.0.attn.norm_q.weight has shape \(0,\)",
        ),
        (
            lambda p, s: torch.save(s | {"y_pos_embedding": torch.zeros(8)}, p),
            r"not a PiD checkpoint: tensor text_embed.positions has shape \(8,\)",
        ),
        (lambda p, s: torch.save({k: s[k] for k in s if "output_heads" not in k}, p), "its adapter has no heads"),
        (lambda p, s: torch.save({"unet.weight": torch.zeros(1)}, p), "not a PiD checkpoint"),
        (lambda p, s: torch.save([1, 2], p), "expected named tensors, got list"),
        (lambda p, s: p.write_bytes(b""), "truncated"),
        (lambda p, s: p.write_bytes(pickle.dumps(Code())), "refused"),
        (lambda p, s: torch.save({"a": Code()}, p), "refused"),
        (lambda p, s: (torch.save(s, p), p.write_bytes(p.read_bytes()[:5000])), "model.pth"),
        (lambda p, s: p.write_text("<html>not found</html>"), "refused|not a readable"),
        (lambda p, s: None, "no such file"),
    ],
    ids=[
        "missing", "extra", "shape", "one column", "no values", "flat", "headless", "foreign", "list", "empty", "code",
        "nested code", "truncated", "html", "absent",
    ],
)  # fmt: skip
def test_bad_file(write, message, tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.pth"
    write(path, golden.state)
    with pytest.raises(ValueError, match=message) as error:
        load_reference_model(path, **overrides(golden))
    assert "model.pth" in str(error.value)


def test_truncated_safetensors(tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.safetensors"
    save_file(golden.state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable"):
        load_reference_model(path, **overrides(golden))


def test_unreleased_network_asks_for_what_is_open(tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.pth"
    torch.save(golden.state, path)
    with pytest.raises(ValueError, match="adapter_padding_mode, rope_reference_size"):
        load_reference_model(path)
    with pytest.raises(ValueError, match='no released checkpoint "nonsense"'):
        load_reference_model(path, preset="nonsense")


@pytest.mark.parametrize(("theirs", "ours"), [(-1, -1), (0, -1), (1, 0), (2, 1), (4, 3)])
def test_auxiliary_block_counts_from_one(theirs, ours):
    """Theirs is the number of residual blocks before the head, where it is not the last features."""
    kwargs = Golden("v15_flux").kwargs | {"lq_aux_rgb_head_latent_block_idx": theirs, "lq_num_res_blocks": 4}
    config = config_from_reference(kwargs)
    assert config["aux_rgb_block"] == ours
    model = tiny_model(**config)
    latents = torch.randn(1, config["latent_channels"], 2, 2)
    before = model.encode_latents(latents, 64, 64, return_aux_rgb=True).aux_rgb
    for block in range(4):
        model.adapter.convs[3 + block].block[5].bias.data += 1
        after = model.encode_latents(latents, 64, 64, return_aux_rgb=True).aux_rgb
        assert torch.equal(before, after) == (theirs > 0 and block + 1 > theirs)
        before = after


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher's folder, with settings that no tensor tells, and an encoder."""
    folder = tmp_path_factory.mktemp("convert") / "teacher"
    config = TINY_V15 | dict(aux_rgb_block=1, num_adapter_layers=3, scale=2)
    PixelDecoderPipeline(
        tiny_model(**config),
        teacher_scheduler(),
        encoder=TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)),
        default_num_inference_steps=25,
        default_guidance_scale=5.0,
        latent_space="flux",
        license="one's own",
        trained_size=512,
    ).save_pretrained(folder)
    return folder


def told(pipeline) -> dict:
    return {key: value for key, value in pipeline.config.items() if key[:1] != "_" and not isinstance(value, tuple)}


def test_settings_come_back(teacher, tmp_path, caplog):
    folder_to_reference(teacher, tmp_path / "model.safetensors")
    assert caplog.messages == [f"{tmp_path}/model.safetensors: left out, as the format has no place for it: encoder"]
    assert load_file(tmp_path / "model.safetensors").keys() == {
        f"net.{name}" for name in export_reference_state_dict(load_folder(teacher).state_dict())
    }
    before = PixelDecoderPipeline.from_pretrained(teacher)
    after = PixelDecoderPipeline.from_pretrained(tmp_path / "model.safetensors")
    expected = dict(
        default_num_inference_steps=25, default_guidance_scale=5.0, latent_space="flux", license="one's own",
        trained_size=512,
    )  # fmt: skip
    assert told(before) == told(after) and told(after).items() >= expected.items()
    assert type(after.scheduler) is DPMSolverMultistepScheduler and after.scheduler.config == before.scheduler.config
    assert (after.transformer.config.aux_rgb_block, after.transformer.config.scale) == (1, 2)
    after.save_pretrained(tmp_path / "again")
    assert_same(load_folder(tmp_path / "again").state_dict(), load_folder(teacher).state_dict())
    assert load_folder(tmp_path / "again").config == load_folder(teacher).config


def test_pth_holds_tensors_alone_and_it_is_said(teacher, tmp_path, caplog):
    folder_to_reference(teacher, tmp_path / "model.pth")
    (line,) = caplog.messages
    for lost in "encoder", "trained_size 512", "latent_space flux", "default_guidance_scale 5.0", "DPMSolverMultistep":
        assert lost in line
    assert "negative_prompt" not in line  # there is none to lose
    caplog.clear()
    folder_to_reference(teacher / "transformer", tmp_path / "network.pth")
    assert caplog.messages == []
    assert torch.load(tmp_path / "model.pth", weights_only=True).keys() == torch.load(tmp_path / "network.pth").keys()


@pytest.mark.parametrize(
    ("name", "scheduler", "steps", "guidance"),
    [
        ("my_undistilled.pth", DPMSolverMultistepScheduler, 25, 5.0),
        ("Teacher-v2/model.safetensors", DPMSolverMultistepScheduler, 25, 5.0),
        ("teachers/my_student.pth", FlowMatchLCMScheduler, 4, 1.0),
        ("my_distill_4step/model.pth", FlowMatchLCMScheduler, 4, 1.0),
    ],
)
def test_unreleased_network_is_sampled_as_its_name_says(name, scheduler, steps, guidance, tmp_path, caplog):
    path = tmp_path / "x" / name
    path.parent.mkdir(parents=True)
    save_reference_checkpoint(tiny_model(**TINY), path)
    options = {
        key: TINY.get(key, value) for key, value in tiny_model().config.items() if key in (*OPEN, "rope_reference_size")
    }
    pipeline = PixelDecoderPipeline.from_pretrained(path, **options)
    assert type(pipeline.scheduler) is scheduler
    assert pipeline.config.default_num_inference_steps == steps
    assert pipeline.config.default_guidance_scale == guidance
    assert pipeline.config.latent_space is pipeline.config.trained_size is pipeline.config.license is None
    assert not caplog.messages


def test_network_of_which_nothing_is_told(tmp_path, caplog):
    golden = Golden("v1_sdxl")
    torch.save(golden.state, tmp_path / "model.pth")
    pipeline = PixelDecoderPipeline.from_pretrained(tmp_path / "model.pth", **overrides(golden))
    assert type(pipeline.scheduler) is FlowMatchLCMScheduler
    assert caplog.messages == [
        f"{tmp_path}/model.pth: nothing tells how it is sampled: taken for a student of 1 to 4 steps"
    ]
    caplog.clear()
    torch.save({k: t for k, t in golden.state.items() if not k.startswith("lq_proj")}, tmp_path / "prior.pth")
    prior = PixelDecoderPipeline.from_pretrained(tmp_path / "prior.pth", rope_reference_size=2048)
    assert type(prior.scheduler) is DPMSolverMultistepScheduler and not caplog.messages
    assert (prior.config.default_num_inference_steps, prior.config.default_guidance_scale) == (50, 2.75)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "its settings .* are not readable"),
        ("[" * 100_000, "its settings .* are not readable"),
        ("[1]", "not what this library writes"),
        ({"network": 5}, "not what this library writes"),
        ({"network": {"num_wheels": 4}}, "this version of pixeldecoder does not know: num_wheels"),
        ({"network": {"patch_size": "x"}}, "patch_size is 'x': expected a whole number"),
        ({"pipeline": {"wheels": 4}, "scheduler": {"_class_name": "DDIMScheduler"}}, "does not know: wheels"),
        ({"pipeline": {}, "scheduler": {"_class_name": "FluxPipeline"}}, "no scheduler 'FluxPipeline'"),
        ({"pipeline": {}}, "no scheduler None"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    golden, path = Golden("v1_sdxl"), tmp_path / "model.safetensors"
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(golden.state, path, {"pixeldecoder": text})
    with pytest.raises(ValueError, match=message) as error:
        PixelDecoderPipeline.from_pretrained(path, **overrides(golden))
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_named_release_is_believed_over_the_files_own_settings(tmp_path):
    """And an argument over both."""
    path, name = tmp_path / "model.safetensors", "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"
    save_reference_checkpoint(tiny_model(**TINY_V15 | dict(rope_reference_size=512)), path)
    load = load_reference_model
    assert load(path).config.rope_reference_size == 512
    assert load(path, name).config.rope_reference_size == 2048
    assert load(path, rope_reference_size=64).config.rope_reference_size == 64
    assert load(path, name, rope_reference_size=64).config.rope_reference_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config | {"num_layers": 2}, r"unexpected: .*patch_blocks\.2"),
        (lambda config: config | {"num_layers": 8}, r"missing: .*patch_blocks\.4"),
        (lambda config: config | {"pixel_dim": 4}, r"of another shape: norm_out.weight \(8,\) for \(4,\)"),
        (lambda config: config | {"wheels": 4}, "does not know: wheels"),
        (lambda config: config | {"scale": 0}, "scale is 0"),
        (lambda config: [], "config.json: expected a JSON object"),
        (lambda config: None, "config.json: expected a JSON object"),
    ],
)
def test_bad_folder(change, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = change(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text("{" if config is None else json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
