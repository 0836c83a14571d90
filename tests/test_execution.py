"""Another kernel, fewer bits, compiled blocks: nearly the same numbers."""

import pytest
import torch

from conftest import TINY, tiny_model
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.execution import compile_blocks, quantize, set_attention
from pixeldecoder.plan import weight_bytes


@pytest.fixture
def given():
    return dict(
        hidden_states=torch.randn(1, 3, 64, 96),
        timestep=500.0,
        encoder_hidden_states=torch.randn(1, 7, 20),
        latents=torch.randn(1, 16, 2, 3),
    )


@torch.no_grad()
@pytest.mark.parametrize(("kind", "share"), [("int8", 0.05), ("float8-storage", 0.15)])
def test_quantized(given, kind, share):
    model = tiny_model(**(TINY | dict(attention_head_dim=64)))
    exact, size = model(**given).sample, weight_bytes(model)
    quantize(model, kind)
    assert weight_bytes(model) < 0.85 * size
    assert model.patch_blocks[0].image.adaln.weight.dtype == torch.float32 or kind == "float8-storage"
    for untouched in (model.pixel_blocks[0].adaln_in, model.adapter.sigma_gates[0].proj, model.proj_out):
        assert type(untouched.weight) is torch.nn.Parameter and untouched.weight.dtype == torch.float32
    error = (model(**given).sample - exact).std() / exact.std()
    assert 1e-4 < error < share


def test_float8_products_need_a_gpu_that_has_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="compute capability 8"):
        quantize(tiny_model(), "float8")


@torch.no_grad()
def test_attention_of_one_model(given):
    model, other = tiny_model(), tiny_model()
    exact = model(**given).sample
    set_attention(model, "_native_math")
    torch.testing.assert_close(model(**given).sample, exact, atol=1e-5, rtol=1e-4)
    assert model.patch_blocks[0].attn.processor._attention_backend == "_native_math"
    assert other.patch_blocks[0].attn.processor._attention_backend is None
    set_attention(model, "auto")
    assert torch.equal(model(**given).sample, exact)


@pytest.mark.parametrize(
    ("name", "message"),
    [("fast", 'backend "fast": expected "auto" or one of'), ("flash", "flash-attn"), ("sage", "sageattention")],
)
def test_attention_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        set_attention(tiny_model(), name)


@torch.no_grad()
def test_compiled_once_for_every_size(given, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("PIXELDECODER_CACHE", str(tmp_path))
    model = tiny_model()
    wide = given | dict(hidden_states=torch.randn(1, 3, 96, 160), latents=torch.randn(1, 16, 3, 5))
    exact = [model(**x, chunk_size=chunk).sample for x in (given, wide) for chunk in (None, 7)]
    torch._dynamo.reset()
    compile_blocks(model)
    compiled = [model(**given).sample, model(**given, chunk_size=7).sample]
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled += [model(**wide).sample, model(**wide, chunk_size=7).sample]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    for one, other in zip(compiled, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert any((tmp_path / "compiled").rglob("*"))


@torch.no_grad()
@pytest.mark.parametrize(("change", "decibels"), [("bfloat16", 50), ("int8", 40), ("float8-storage", 35)])
def test_nano_in_lower_precision(change, decibels):
    """PSNR of its image against float32's."""
    images = []
    for lower in (False, True):
        dtype = torch.bfloat16 if lower and change == "bfloat16" else torch.float32
        pipeline = PixelDecoderPipeline.from_pretrained("nano", torch_dtype=dtype)
        if lower and change != "bfloat16":
            quantize(pipeline.transformer, change)
        latents = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(latents, generator=generator, output_type="pt").images)
    psnr = -10 * (images[0] - images[1]).square().mean().log10()
    assert decibels < psnr < torch.inf  # which the same numbers would have


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(tmp_path, monkeypatch):
    """Chunks, tiles, kernels, compilation and float8 where they are meant to run, against the CPU in float32."""
    monkeypatch.setenv("PIXELDECODER_CACHE", str(tmp_path))

    def decode(device, dtype, change=lambda model: None, **kwargs):
        pipeline = PixelDecoderPipeline.from_pretrained("nano", torch_dtype=dtype).to(device)
        change(pipeline.transformer)
        latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(0)
        return pipeline(latents, generator=generator, output_type="pt", **kwargs).images.cpu()

    exact = decode("cpu", torch.float32)

    def psnr(*args, **kwargs):
        return -10 * (decode(*args, **kwargs) - exact).square().mean().log10()

    assert psnr("cuda", torch.float32) > 80
    assert psnr("cuda", torch.float32, chunk_size=100) > 80
    assert psnr("cuda", torch.bfloat16) > 45
    assert psnr("cuda", torch.bfloat16, compile_blocks) > 45
    assert psnr("cuda", torch.bfloat16, tile_size=256) > 35
    for kind in ("int8", "float8", "float8-storage"):
        assert psnr("cuda", torch.bfloat16, lambda model, kind=kind: quantize(model, kind)) > 35
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(ValueError, match="allow more memory"):
        decode("cuda", torch.bfloat16, max_memory="20MB")
