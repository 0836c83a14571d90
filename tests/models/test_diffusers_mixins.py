"""What diffusers' tests ask of every model (tests/models/testing_utils, commit 58eb52c), in a small form of our own."""

import copy
import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import diffusers.hooks.group_offloading as offloading
import pytest
import torch
from diffusers import AutoModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import dynamic_modules_utils, logging
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from conftest import TINY, TINY_NANO, TINY_V15, relative, tiny_model, tiny_pipeline
from pixeldecoder import (
    PixelDecoderDiscriminator,
    PixelDecoderPipeline,
    PixelDecoderTransformer2DModel,
    TinyLatentEncoder,
)
from pixeldecoder.models.layers import AttentionProcessor

CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_V15, TINY_NANO], ids=["v1", "v1.5", "nano"])


def inputs(config=TINY, batch=1, height=64, width=96) -> dict:
    generator = torch.Generator().manual_seed(1)
    given = dict(
        hidden_states=torch.randn(batch, 3, height, width, generator=generator),
        timestep=torch.full((batch,), 500.0),
        latents=torch.randn(batch, 16, height // 32, width // 32, generator=generator),
        sigma=torch.full((batch,), 0.3),
    )
    if config["text_embed_dim"] is not None:
        given["encoder_hidden_states"] = torch.randn(batch, 7, config["text_embed_dim"], generator=generator)
    return given


# Saving and loading


@pytest.mark.parametrize(("variant", "shard"), [(None, "5GB"), ("fp16", "5GB"), (None, "100KB"), ("fp16", "100KB")])
@torch.no_grad()
def test_save_and_load(variant, shard, tmp_path):
    model = tiny_model(**TINY_V15)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "100KB")
    loaded = PixelDecoderTransformer2DModel.from_pretrained(tmp_path, variant=variant)
    assert not loaded.training
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
    torch.testing.assert_close(loaded(**inputs()).sample, model(**inputs()).sample, atol=1e-5, rtol=1e-5)
    if variant:
        with pytest.raises(OSError, match="no file named"):
            PixelDecoderTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_load_in_another_dtype(low_cpu_mem_usage, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = PixelDecoderTransformer2DModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_device_map(tmp_path):
    """Half of the network on disk, brought by accelerate's hooks part by part."""
    model = tiny_model(**TINY_NANO)
    exact = model(**inputs(TINY_NANO)).sample
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" if name in ("adapter", "patch_blocks") else "cpu" for name, _ in model.named_children()}
    loaded = PixelDecoderTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.adapter.pixel_sigma_gate.proj.weight.is_meta
    features = loaded.encode_latents(inputs(TINY_NANO)["latents"], 64, 96, sigma=0.3)
    given = inputs(TINY_NANO) | {"latents": None, "latent_features": features}
    torch.testing.assert_close(loaded(**given).sample, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (lambda: tiny_model(**TINY_NANO), lambda: inputs(TINY_NANO)),
        (lambda: TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)), lambda: {"image": torch.ones(1, 3, 16, 16)}),
        (lambda: PixelDecoderDiscriminator(32), lambda: {"features": (torch.ones(1, 32, 8, 8),)}),
    ],
    ids=["transformer", "encoder", "discriminator"],
)
@torch.no_grad()
def test_auto_model(model, given, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = model()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(str(tmp_path / "model"), trust_remote_code=True)
    assert type(loaded) is type(model)
    # A file's tensors are used where they lie in it. From addresses that are no multiples of 16, matrix products take
    # another kernel, which rounds otherwise (2e-5 here); copies are aligned, as the model's own weights are.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    outputs = (x if isinstance(x, torch.Tensor) else x.sample for x in (loaded(**given()), model(**given())))
    torch.testing.assert_close(*outputs, atol=0, rtol=0)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(str(tmp_path / "model"))
    logging.enable_propagation()
    again = type(model).from_pretrained(tmp_path / "model")  # and is no unknown argument
    logging.disable_propagation()
    assert "auto_map" not in caplog.text and "auto_map" not in again.config


def test_folders_of_earlier_versions(tmp_path):
    """Their index names the modules that the classes were in."""
    tiny_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = ["pixeldecoder.models.transformer", "PixelDecoderTransformer2DModel"]
    index["encoder"] = ["pixeldecoder.models.encoder", "TinyLatentEncoder"]
    index["_class_name"] = "PixelDecoderPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder in "transformer", "encoder":
        config = json.loads((tmp_path / folder / "config.json").read_text())
        config.pop("auto_map")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        (tmp_path / folder / "pixeldecoder.py").unlink()
    loaded = PixelDecoderPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.transformer.patch_embed.weight, tiny_model(**TINY_NANO).patch_embed.weight)
    assert type(loaded.encoder) is TinyLatentEncoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2}, r"\d+ unexpected: .*patch_blocks\.[23]"),
        ({"num_layers": 6, "injection_interval": 3}, r"\d+ missing: .*patch_blocks\.[45]"),
        ({"aux_rgb_base": True}, "an older nano's"),
        ({"num_layers": -1}, "num_layers is -1: expected a whole number, at least 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        PixelDecoderTransformer2DModel.from_pretrained(tmp_path)


def test_quantized_weights_may_have_other_names(monkeypatch, tmp_path):
    """bitsandbytes stores what it needs beside them; it quantises on a GPU alone."""
    loaded = SimpleNamespace(hf_quantizer=object()), {"missing_keys": [], "unexpected_keys": ["weight.absmax"]}
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(lambda cls, path, **kwargs: loaded))
    assert PixelDecoderTransformer2DModel.from_pretrained(tmp_path) is loaded[0]
    assert PixelDecoderTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True) == loaded


# Outputs, training


@CONFIGS
@torch.no_grad()
def test_outputs(config):
    model = tiny_model(**config)
    first, second = model(**inputs(config)), model(**inputs(config), return_dict=False)
    assert torch.equal(first.sample, second[0]) and len(second) == 1
    assert PixelDecoderTransformer2DModel.from_config(model.config).config == model.config


def test_training():
    """Every parameter that is used has a gradient, a step lowers the loss, and diffusers' average follows."""
    model, given = tiny_model(**TINY_NANO).train(), inputs(TINY_NANO, batch=2)
    average = EMAModel(model.parameters(), 0.5, model_cls=type(model), model_config=model.config, use_ema_warmup=False)
    before = model.proj_out.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    losses = []
    for _ in range(2):
        output = model(**given, return_aux_rgb=True)
        loss = output.sample.square().mean() + output.aux_rgb.square().mean()
        losses.append(loss.item())
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []
        optimizer.step()
        average.step(model.parameters())
    assert losses[1] < losses[0]
    average.copy_to(model.parameters())
    assert not torch.equal(model.proj_out.weight, before)


# Memory


class Stream(torch.cpu.Stream):
    """Of a CPU, which does all in order."""

    def synchronize(self) -> None:
        pass


class Backend:
    Stream = Stream
    stream = staticmethod(torch.cpu.stream)
    current_stream = Stream

    def __init__(self, device: torch.device):
        pass


@pytest.mark.parametrize("streams", [False, True], ids=["", "streams"])
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(
    ("config", "level"),
    [(TINY, "block_level"), (TINY_V15, "block_level"), (TINY_NANO, "block_level"), (TINY_NANO, "leaf_level")],
    ids=["v1", "v1.5", "nano", "nano-leaf"],
)
@torch.no_grad()
def test_group_offload(config, level, disk, streams, tmp_path, monkeypatch):
    """Whole, in tiles and again, as without offloading; what lies on disk is nowhere else until it is brought."""
    pipeline = tiny_pipeline(**config)
    text = None if config["text_embed_dim"] is None else torch.randn(1, 5, 20)
    latents = torch.randn(1, 16, 3, 3)

    def decode(**kwargs) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            latents, prompt_embeds=text, generator=generator, num_inference_steps=2, output_type="pt", **kwargs
        ).images

    tiles = dict(tile_size=64, tile_overlap=32)
    exact = decode(), decode(**tiles)
    if streams:  # which diffusers refuses on a CPU, and does not need there
        apply = offloading._apply_group_offloading
        monkeypatch.setattr(
            offloading, "_apply_group_offloading", lambda model, config: apply(model, replace(config, stream=Stream()))
        )
        monkeypatch.setattr(offloading, "TorchDeviceBackend", Backend)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    pipeline.transformer.enable_group_offload(
        torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path) if disk else None,
    )
    assert bool(list(tmp_path.glob("*.safetensors"))) == disk
    for other, one in zip((decode(), decode(**tiles), decode()), (*exact, exact[0]), strict=True):
        # Gates whose layer is brought when it is called read tokens and latents at once.
        torch.testing.assert_close(other, one, atol=1e-5 if disk or level == "leaf_level" else 0, rtol=0)


@torch.no_grad()
def test_group_offload_with_layerwise_casting():
    """What the command does where weights do not fit and are to be stored in 8 bits."""
    model = tiny_model(**TINY_V15)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    exact = model(**inputs()).sample
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(model(**inputs()).sample, exact)


# Attention


def test_attention_processors():
    model = tiny_model()
    processors = model.attn_processors
    assert len(processors) == 6 and {type(processor) for processor in processors.values()} == {AttentionProcessor}
    new = {name: AttentionProcessor() for name in processors}
    model.set_attn_processor(dict(new))
    assert model.attn_processors == new
    assert model.patch_blocks[1].attn.get_processor() is new["patch_blocks.1.attn.processor"]
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(dict([new.popitem()]))


@torch.no_grad()
def test_attention_backend_by_context_and_by_method():
    model = tiny_model()
    exact = model(**inputs()).sample
    with attention_backend("_native_math"):
        by_context = model(**inputs()).sample
    with attention_backend("native"):  # put back what the method changes for every model
        model.set_attention_backend("_native_math")
        assert torch.equal(model(**inputs()).sample, by_context)
        model.reset_attention_backend()
    torch.testing.assert_close(by_context, exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(**inputs()).sample, exact)


@torch.no_grad()
def test_fusing_projections_that_are_one_already():
    model = tiny_model()
    exact, names = model(**inputs()).sample, model.state_dict().keys()
    model.fuse_qkv_projections()
    assert torch.equal(model(**inputs()).sample, exact)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs()).sample, exact) and model.state_dict().keys() == names


# LoRA


def lora_config(targets: list[str] | str, **kwargs):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False, **kwargs)


USUAL = ["to_q", "to_k", "to_v", "to_out.0"]


@torch.no_grad()
def test_lora_by_the_usual_names(tmp_path):
    """As diffusers' own training scripts name them; saved, unloaded and loaded."""
    model = tiny_model()
    exact = model(**inputs()).sample
    config = lora_config(USUAL)
    model.add_adapter(config)
    assert config.target_modules == set(USUAL)  # the caller's is left alone
    adapted = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    blocks = [f"{kind}_blocks.{i}.attn" for kind, count in (("patch", 4), ("pixel", 2)) for i in range(count)]
    assert adapted == {f"{block}.{layer}" for block in blocks for layer in ("to_qkv", "to_out")}
    changed = model(**inputs()).sample
    assert relative(changed, exact) > 1e-3
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(model(**inputs()).sample, exact)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(model(**inputs()).sample, changed)
    with pytest.raises(ValueError, match="foo not found"):
        model.save_lora_adapter(tmp_path, adapter_name="foo")


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["patch_blocks.0.attn.to_k"], {"patch_blocks.0.attn.to_qkv"}),
        (["attn.add_q_proj"], {f"patch_blocks.{i}.attn.add_qkv" for i in range(4)}),
        (r"patch_blocks\.1\.attn\.to_out", {"patch_blocks.1.attn.to_out"}),
        (["proj_out"], {"proj_out"}),
    ],
)  # fmt: skip
def test_lora_targets(targets, adapted):
    model = tiny_model()
    model.add_adapter(lora_config(targets))
    assert {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")} == adapted


@torch.no_grad()
def test_lora_scale_of_one_call():
    """Of the blocks and of the adapter, which runs by itself; half the strength of a call is half the strength set."""
    model, given = tiny_model(**TINY_V15), inputs()
    exact = model(**given).sample
    model.add_adapter(lora_config([*USUAL, "adapter.heads.0", "pixel_head"]))
    full = model(**given).sample

    def call(scale: float) -> torch.Tensor:
        kwargs = {"attention_kwargs": {"scale": scale}}
        features = model.encode_latents(given["latents"], 64, 96, **kwargs)
        return model(**(given | {"latents": None, "latent_features": features}), **kwargs).sample

    half = call(0.5)
    assert torch.equal(call(0.0), exact) and torch.equal(model(**given).sample, full)
    model.set_adapters(["default"], [0.5])
    torch.testing.assert_close(model(**given).sample, half)
    assert relative(half, full) > 1e-3 and relative(half, exact) > 1e-3
    with pytest.raises(ValueError, match='expected "scale" alone, got strength, too'):
        model(**given, attention_kwargs={"scale": 1.0, "strength": 2})


# Compilation and export


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_copies_of_compiled_blocks(fresh_compiler):
    """They compute with their own weights, and need not be compiled."""
    model = tiny_model()
    model.compile_repeated_blocks(backend="eager")
    exact = model(**inputs()).sample
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        torch.testing.assert_close(other(**inputs()).sample, exact, atol=1e-5, rtol=1e-5)
        for block in (*other.patch_blocks, *other.pixel_blocks):
            nn.init.zeros_(block.attn.to_out.weight)
        assert relative(other(**inputs()).sample, exact) > 1e-3
        other.compile_repeated_blocks(backend="eager")
        assert relative(other(**inputs()).sample, exact) > 1e-3
    assert torch.equal(model(**inputs()).sample, exact)


SMALL = TINY_NANO | dict(num_layers=1, num_pixel_layers=1)
"""Traced in seconds."""


@torch.no_grad()
def test_one_graph_for_all_sizes(fresh_compiler):
    """Without a break, and for another number of images too."""
    model = tiny_model(**SMALL)
    sizes = [(2, 64, 96), (2, 96, 160), (3, 160, 64)]
    exact = [model(**inputs(SMALL, *size)).sample for size in sizes]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.fx.experimental._config.patch(use_duck_shape=False):  # sizes that are equal now need not be later
        compiled(**inputs(SMALL, *sizes[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, one in zip(sizes, exact, strict=True):
            torch.testing.assert_close(compiled(**inputs(SMALL, *size)).sample, one, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_export():
    """A program for every size and number of images; the network is as before, and so is another one."""
    config = SMALL | dict(text_embed_dim=20)
    model = tiny_model(**config)
    given, other = inputs(config, 2, 64, 96), inputs(config, 3, 160, 128)
    auto = {name: dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for name, x in given.items()}
    program = torch.export.export(model, (), given, dynamic_shapes=auto).module()
    for size in given, other:
        exact = model(**size).sample
        assert type(exact) is torch.Tensor
        torch.testing.assert_close(program(**size).sample, exact, atol=1e-4, rtol=1e-4)
    assert type(tiny_model(**config)(**given).sample) is torch.Tensor


@torch.no_grad()
def test_export_of_bfloat16_attention():
    """Eager, it works on rows at a time on a CPU, which would make a program for one length."""
    layer = tiny_model().bfloat16().patch_blocks[0].attn
    short, long = (torch.randn(2, length, 3, 2, 16, dtype=torch.bfloat16) for length in (20, 70))
    program = torch.export.export(layer, (short,), dynamic_shapes=({1: torch.export.Dim.AUTO},)).module()
    for qkv in short, long:
        exact = layer(qkv)
        assert (program(qkv) - exact).std() < 0.02 * exact.std()


@torch.no_grad()
def test_nothing_is_kept_of_fake_tensors():
    model = tiny_model()
    exact = model(**inputs()).sample
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(model(**inputs()).sample, FakeTensor)
        assert isinstance(model(**inputs(height=96)).sample, FakeTensor)
    assert torch.equal(model(**inputs()).sample, exact)
    assert type(model(**inputs(height=96)).sample) is torch.Tensor


# Rotary tables


@CONFIGS
@torch.no_grad()
def test_rotary_tables_made_once(config, monkeypatch):
    """For a decode in tiles, with guidance, one time each; given or not, the numbers are the same."""
    model = tiny_model(**config)
    given, tables = inputs(config), model.image_rotary(64, 96)
    assert torch.equal(model(**given, image_rotary_emb=tables).sample, model(**given).sample)
    with pytest.raises(ValueError, match="image_rotary_emb is of 24 patches, the image has 48"):
        model(**inputs(config, height=128), image_rotary_emb=tables)
    assert all(x.is_meta for table in model.image_rotary(64, 96, torch.device("meta")) for x in table)
    pipeline, sizes = tiny_pipeline(**config), []
    make = PixelDecoderTransformer2DModel.image_rotary
    monkeypatch.setattr(
        PixelDecoderTransformer2DModel,
        "image_rotary",
        lambda self, height, width, device=None: sizes.append((height, width)) or make(self, height, width, device),
    )
    text = None if config["text_embed_dim"] is None else torch.randn(1, 5, 20)
    pipeline(
        torch.randn(1, 16, 3, 5), prompt_embeds=text, negative_prompt_embeds=text, guidance_scale=2.0, tile_size=64
    )
    assert sizes == [(64, 64)]
