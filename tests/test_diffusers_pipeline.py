"""What diffusers asks of every pipeline: saving, calls, callbacks, offloading, sharing of parts."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.callbacks import PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from transformers import AutoModel as TransformersModel
from transformers import AutoTokenizer

from conftest import TINY, tiny_model, tiny_pipeline
from families import save_gemma
from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel, TinyLatentEncoder
from pixeldecoder.convert import folder_to_reference
from pixeldecoder.presets import NANO
from pixeldecoder.text import PromptEncoder

LATENTS = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def decode(pipeline, latents=LATENTS, seed=0, **kwargs):
    return pipeline(latents, generator=seeded(seed), output_type="latent", **kwargs).images


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    save_gemma(folder)
    return str(folder)


def with_text(gemma, **kwargs):
    """Sampled without fresh noise, so that what comes after a step depends on its image alone."""
    pipeline = PixelDecoderPipeline(
        tiny_model(**TINY), FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=TransformersModel.from_pretrained(gemma).eval(), tokenizer=AutoTokenizer.from_pretrained(gemma),
        **kwargs,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Saving and loading


def test_every_part_and_setting_is_saved(gemma, tmp_path):
    pipeline = with_text(
        gemma, default_num_inference_steps=2, default_guidance_scale=3.0, latent_space="flux", trained_size=64,
        default_negative_prompt="dog", encoder=TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)).eval(),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path)
    loaded = PixelDecoderPipeline.from_pretrained(tmp_path)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in pipeline.components.items()
    }
    assert loaded.parameters == pipeline.parameters and loaded.parameters["default_negative_prompt"] == "dog"
    one, other = (decode(p, prompt="a cat") for p in (loaded, pipeline))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"trained_size": "x"}, "trained_size is 'x': expected a whole number, at least 1"),
        ({"trained_size": 0}, "trained_size is 0: expected a whole number"),
        ({"default_num_inference_steps": 1.5}, "default_num_inference_steps is 1.5: expected a whole number"),
        ({"latent_space": 5}, "latent_space is 5: expected a text"),
    ],
)
def test_settings_that_cannot_be(setting, expected, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=expected):
        PixelDecoderPipeline.from_pretrained(tmp_path)


def test_variants_and_parts_that_are_left_out(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = PixelDecoderPipeline.from_pretrained(tmp_path, variant="fp16", encoder=None)
    assert loaded.encoder is None and loaded.text_encoder is None
    torch.testing.assert_close(decode(loaded), decode(pipeline))
    loaded.save_pretrained(tmp_path / "again")
    assert PixelDecoderPipeline.from_pretrained(tmp_path / "again").encoder is None


def test_dtypes_of_loading(tmp_path, recwarn):
    tiny_pipeline().save_pretrained(tmp_path)
    for kwargs in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        loaded = PixelDecoderPipeline.from_pretrained(tmp_path, **kwargs)
        assert loaded.transformer.dtype == loaded.encoder.dtype == torch.bfloat16
    mixed = PixelDecoderPipeline.from_pretrained(
        tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    assert (mixed.transformer.dtype, mixed.encoder.dtype) == (torch.bfloat16, torch.float32)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_the_bundled_decoder_loads_in_silence(capfd, recwarn):
    shown = diffusers.utils.logging.is_progress_bar_enabled()
    PixelDecoderPipeline.from_pretrained("nano", torch_dtype=torch.bfloat16)
    out, err = capfd.readouterr()
    assert "Loading" not in out + err and not [w for w in recwarn if issubclass(w.category, FutureWarning)]
    assert diffusers.utils.logging.is_progress_bar_enabled() == shown


@pytest.fixture
def no_module_cache(tmp_path_factory, monkeypatch):
    """diffusers copies a folder's code here before it is imported."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def test_diffusers_opens_a_saved_folder(tmp_path, no_module_cache):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is PixelDecoderPipeline and type(loaded.encoder) is TinyLatentEncoder
    torch.testing.assert_close(decode(loaded), decode(pipeline))
    network = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert type(network) is PixelDecoderTransformer2DModel


@pytest.mark.parametrize("folder", ["saved", "bundled"])
def test_names_in_a_folder_outlive_a_move_of_files(folder, tmp_path):
    if folder == "saved":
        tiny_pipeline().save_pretrained(tmp_path)
    index = json.loads(((tmp_path if folder == "saved" else NANO) / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "PixelDecoderPipeline"]
    assert index["transformer"] == ["pixeldecoder", "PixelDecoderTransformer2DModel"]
    assert index["encoder"] == ["pixeldecoder", "TinyLatentEncoder"]
    assert not any("/" in value for value in index.values() if isinstance(value, str))


def test_folders_of_earlier_versions(tmp_path):
    """They name modules, which may be elsewhere since."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["default_negative_prompt"]
    for name in ("transformer", "encoder"):
        index[name][0] = f"pixeldecoder.of_old.{name}"
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "PixelDecoderPipeline"}))
    for code in tmp_path.rglob("*.py"):
        code.unlink()
    loaded = PixelDecoderPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(decode(loaded), decode(pipeline))


def test_hub_repository(tmp_path, no_module_cache):
    """As it lies in the Hub's cache: our class needs no code of it, diffusers' takes it if told to trust it."""
    repository = tmp_path / "models--somebody--decoder"
    snapshot = repository / "snapshots" / "abc"
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    kwargs = dict(cache_dir=str(tmp_path), local_files_only=True)
    loaded = PixelDecoderPipeline.from_pretrained("somebody/decoder", **kwargs)
    torch.testing.assert_close(decode(loaded), decode(pipeline))
    pipeline.register_to_config(default_num_inference_steps=2)
    pipeline.save_pretrained(repository / "snapshots" / "def")
    (repository / "refs" / "old").write_text("def")
    older = PixelDecoderPipeline.from_pretrained("somebody/decoder", revision="old", **kwargs)
    assert (loaded.config.default_num_inference_steps, older.config.default_num_inference_steps) == (4, 2)
    with pytest.raises(ValueError, match=r"somebody/other could not be loaded.*no such folder here"):
        PixelDecoderPipeline.from_pretrained("somebody/other", **kwargs)
    # What diffusers' own classes check before they fetch anything.
    files = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")}
    index = json.loads((snapshot / "model_index.json").read_text())
    found, _ = _get_custom_components_and_folders("somebody/decoder", index, files)
    assert found == {"transformer": "pixeldecoder", "encoder": "pixeldecoder"} and "pipeline.py" in files
    opened = DiffusionPipeline.from_pretrained("somebody/decoder", trust_remote_code=True, **kwargs)
    assert type(opened) is PixelDecoderPipeline


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "nothing/", "~/nothing", "a/b/c", "nanoo"])
def test_no_such_decoder(name):
    with pytest.raises(ValueError, match=rf'no decoder "{name}": no such folder or file.*: expected "nano"'):
        PixelDecoderPipeline.from_pretrained(name)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_pipeline().save_pretrained(tmp_path / "dec")
    assert PixelDecoderPipeline.from_pretrained("~/dec").encoder is not None
    assert PixelDecoderTransformer2DModel.from_pretrained("~/dec/transformer").config.scale == 4
    folder_to_reference(save_with_text(tmp_path / "text"), tmp_path / "text.safetensors")
    assert PixelDecoderPipeline.from_pretrained("~/text.safetensors").transformer.config.text_embed_dim == 20
    assert PixelDecoderPipeline.from_single_file("~/text.safetensors").transformer.config.text_embed_dim == 20


def save_with_text(folder: Path) -> Path:
    PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0)).save_pretrained(folder)
    return folder


def test_nothing_computes_in_float8(tmp_path):
    folder = save_with_text(tmp_path / "dec")
    with pytest.raises(ValueError, match=r"dec: nothing computes in torch.float8_e4m3fn: give dtype=torch.bfloat16"):
        PixelDecoderPipeline.from_pretrained(folder, torch_dtype=torch.float8_e4m3fn)
    tiny_model(**TINY).to(torch.float8_e4m3fn).save_pretrained(folder / "transformer")
    assert PixelDecoderPipeline.from_pretrained(folder).transformer.dtype == torch.float32


# Calls


def test_dictionary_and_tuple_are_the_same():
    pipeline = tiny_pipeline()
    for kind in ("latent", "pt", "np"):
        given = dict(output_type=kind)
        one = pipeline(LATENTS, generator=seeded(), **given)
        other = pipeline(LATENTS, generator=seeded(), return_dict=False, **given)
        assert isinstance(other, tuple) and len(other) == 1
        assert torch.equal(torch.as_tensor(one.images), torch.as_tensor(other[0]))


def test_a_batch_of_prompts_is_each_alone(gemma):
    pipeline = with_text(gemma)
    latents = torch.randn(3, 16, 2, 2, generator=seeded(1))
    prompts = ["a cat", "a red dog " * 20, ""]
    together = pipeline(
        latents, prompts, negative_prompt=["dog", "", "red"], guidance_scale=2.0, output_type="latent",
        generator=[seeded(i) for i in range(3)],
    ).images  # fmt: skip
    for i, negative in enumerate(["dog", "", "red"]):
        alone = decode(
            pipeline, latents[i : i + 1], seed=i, prompt=prompts[i], negative_prompt=negative, guidance_scale=2.0
        )
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_threads_do_not_meet(gemma):
    """Different steps and guidance at a time, two of them stopped: as one after another."""
    pipeline = with_text(gemma)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipeline.encode_prompt("a", "b", True), strict=True))
    jobs = [dict(num_inference_steps=1 + i % 4, guidance_scale=1.0 + i % 3) for i in range(12)]
    seen = [[] for _ in jobs]

    def run(i):
        def look(pipe, step, timestep, tensors):
            seen[i].append((pipe.num_timesteps, pipe.guidance_scale))
            if i in (2, 7) and step == 1:
                pipe._interrupt = True
            return {}

        return decode(pipeline, seed=i, **jobs[i], **embeds, callback_on_step_end=look)

    expected = [run(i) for i in range(len(jobs))]
    for calls in seen:
        calls.clear()
    with ThreadPoolExecutor(3) as pool:
        for image, truth in zip(pool.map(run, range(len(jobs))), expected, strict=True):
            torch.testing.assert_close(image, truth, atol=1e-5, rtol=1e-5)
    for i, (job, calls) in enumerate(zip(jobs, seen, strict=True)):
        steps = job["num_inference_steps"]
        assert calls == [(steps, job["guidance_scale"])] * (2 if i in (2, 7) else steps)


def test_the_scheduler_is_left_alone():
    pipeline = tiny_pipeline()
    before = copy.deepcopy(vars(pipeline.scheduler))
    decode(pipeline, num_inference_steps=2)
    assert {k: v for k, v in vars(pipeline.scheduler).items() if not torch.is_tensor(v)} == {
        k: v for k, v in before.items() if not torch.is_tensor(v)
    }
    decode(copy.deepcopy(pipeline))


# Callbacks


def test_callback_gets_what_it_asks_for():
    pipeline, calls = tiny_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        calls.append((pipe is pipeline, step, round(timestep.item()), sorted(tensors), pipe.num_timesteps))

    for asked in ([], ["image"]):
        decode(pipeline, num_inference_steps=3, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=asked)
        assert calls == [(True, i, t, asked, 3) for i, t in enumerate((999, 866, 342))]
        calls.clear()


class Cutoff(PipelineCallback):
    """Ends guidance as diffusers' own callbacks do."""

    tensor_inputs = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert callback_kwargs == {}
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
        return callback_kwargs


def replaced(image):
    """A callback that puts an image after the first step."""
    return lambda pipe, step, timestep, tensors: {"image": image} if step == 0 else {}


@pytest.mark.parametrize(("before", "after"), [(3.0, 5.0), (3.0, 1.0), (3.0, 0.0), (1.0, 3.0)])
def test_guidance_changed_in_a_callback(gemma, before, after):
    """Steps from then on are as of a run that always had it."""
    pipeline, given = with_text(gemma, default_negative_prompt="dog"), dict(prompt="a cat", num_inference_steps=3)
    images, passes = [], []

    def change(pipe, step, timestep, tensors):
        images.append(tensors["image"])
        passes.append(len(calls))
        pipe._guidance_scale = after
        assert pipe.guidance_scale == after

    calls = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    changed = decode(pipeline, guidance_scale=before, callback_on_step_end=change, **given)
    hook.remove()
    assert pipeline.guidance_scale == after
    assert passes == [(1 if before <= 1 else 2) + i * (1 if after <= 1 else 2) for i in range(3)]
    truth = decode(pipeline, guidance_scale=after, callback_on_step_end=replaced(images[0]), **given)
    torch.testing.assert_close(changed, truth)
    other = decode(pipeline, guidance_scale=before, **given)
    assert (changed - other).abs().max() > 1e-2


def test_diffusers_callbacks(gemma):
    pipeline, given = with_text(gemma), dict(prompt="a cat", num_inference_steps=4)
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    decode(pipeline, guidance_scale=3.0, callback_on_step_end=Cutoff(cutoff_step_ratio=0.5), **given)
    assert len(calls) == 3 * 2 + 1


def test_interrupt_between_steps():
    pipeline, seen = tiny_pipeline(), []

    def stop(pipe, step, timestep, tensors):
        assert not pipe.interrupt
        seen.append(tensors["image"].clone())
        pipe._interrupt = step == 1

    assert torch.equal(decode(pipeline, callback_on_step_end=stop), seen[1]) and len(seen) == 2
    assert pipeline.interrupt
    decode(pipeline, callback_on_step_end=lambda *args: seen.append(1))
    assert len(seen) == 2 + 4  # the next call is not stopped


def test_interrupt_between_tiles():
    pipeline, calls = tiny_pipeline(), []
    latents = torch.randn(1, 16, 4, 4, generator=seeded(2))
    given = dict(tile_size=64, tile_overlap=16)

    def hook(*args):
        calls.append(1)
        if len(calls) == 9 + 3:  # 9 tiles a step
            pipeline._interrupt = True

    first = []
    decode(pipeline, latents, callback_on_step_end=lambda p, i, t, x: first.append(x["image"]), **given)
    pipeline.transformer.register_forward_pre_hook(hook)
    assert torch.equal(decode(pipeline, latents, **given), first[0])
    assert len(calls) == 9 + 3


def test_interrupt_from_another_thread():
    """An interface's button, pressed while a worker decodes; the thread had decoded before."""
    pipeline, begun, pressed, steps = tiny_pipeline(), threading.Event(), threading.Event(), []
    decode(pipeline)

    def work(pipe, step, timestep, tensors):
        steps.append(step)
        begun.set()
        assert pressed.wait(30)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(decode, pipeline, callback_on_step_end=work)
        assert begun.wait(30)
        pipeline._interrupt = True
        pressed.set()
        future.result()
    assert steps == [0]


def test_properties_before_any_call():
    for name in ("num_timesteps", "guidance_scale", "interrupt"):
        assert not hasattr(tiny_pipeline(), name)  # as in diffusers


# Parts: shared, moved, offloaded


def test_components_make_the_same_pipeline():
    pipeline = tiny_pipeline()
    again = PixelDecoderPipeline(**pipeline.components, **pipeline.parameters)
    assert sorted(pipeline.components) == ["encoder", "scheduler", "text_encoder", "tokenizer", "transformer"]
    assert torch.equal(decode(again), decode(pipeline)) and again.transformer is pipeline.transformer


def test_from_pipe(gemma):
    pipeline = PixelDecoderPipeline(
        tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0), default_num_inference_steps=2, latent_space="flux"
    )
    pipeline.prompt_encoder = PromptEncoder(gemma)
    decode(pipeline, prompt="a cat")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    new = PixelDecoderPipeline.from_pipe(pipeline, scheduler=scheduler)
    assert new.prompt_encoder is pipeline.prompt_encoder and new.transformer is pipeline.transformer
    assert new.scheduler is scheduler and new.config.latent_space == "flux"
    decode(new, prompt="a cat")
    assert new.num_timesteps == 2


def test_to_casts_every_part(gemma):
    pipeline = with_text(gemma, encoder=TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)).eval())
    exact = decode(pipeline, prompt="a cat")
    pipeline.to(torch.bfloat16)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.encoder)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    image = decode(pipeline, prompt="a cat")
    assert image.dtype == torch.float32 and 0 < (image - exact).abs().mean() < 0.1
    assert pipeline.encode_image(Image.new("RGB", (32, 32))).dtype == torch.float32


def test_sequential_offload(gemma):
    """Weights are on no device but while their layer runs."""
    pipeline = with_text(gemma, encoder=TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)).eval())
    photo = Image.effect_noise((32, 48), 50).convert("RGB")
    given = dict(prompt="a cat", negative_prompt="dog", guidance_scale=2.0, output_type="latent")
    exact = pipeline.upscale(photo, generator=seeded(), **given).images
    latents = pipeline.encode_image(photo)
    for part in (pipeline.text_encoder, pipeline.encoder, pipeline.transformer):
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))
        assert part.device.type == "meta"
    # A gate's layer that is brought when called is not split in two: other products, rounded otherwise.
    offloaded = pipeline.upscale(photo, generator=seeded(), **given).images
    torch.testing.assert_close(offloaded, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipeline.encode_image(photo), latents)
    assert pipeline.encode_prompt("a cat")[0].device.type == "cpu"


def test_parts_may_be_on_other_devices_than_the_network(gemma, monkeypatch):
    """As where the network's blocks take turns on a device: what encodes does so where it is."""
    pipeline = with_text(gemma, encoder=TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)).eval())
    photo = Image.effect_noise((32, 48), 50).convert("RGB")
    latents, (embeds, _) = pipeline.encode_image(photo), pipeline.encode_prompt("a cat")
    elsewhere = property(lambda self: torch.device("meta"))
    monkeypatch.setattr(type(pipeline), "_execution_device", elsewhere)
    assert torch.equal(pipeline.encode_image(photo), latents)
    assert torch.equal(pipeline.encode_prompt("a cat")[0], embeds)
