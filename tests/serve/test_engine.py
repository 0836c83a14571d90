"""One thread owns the device: batches, order, limits, cancelling, and answers that equal local decodes."""

import asyncio
import os
import queue
import sys
import threading
import time
from concurrent.futures import CancelledError

import psutil
import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from families import build
from pixeldecoder.ldm import generate
from pixeldecoder.plan import Limits, plan
from pixeldecoder.serve import engine as serving_engine
from pixeldecoder.serve.engine import Engine, generator, noise_generator
from pixeldecoder.serve.jobs import ClosedError, Request, TooLargeError
from serving import Gate, latents, photo


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 2e-4)


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def engine(pipeline):
    engine = Engine({"tiny": pipeline}, queue_size=12)
    yield engine
    engine.close(drain=False)


def request(**kwargs) -> Request:
    return Request(decoder="tiny", **{"latents": latents(0)} | kwargs if "image" not in kwargs else kwargs)


def test_each_answer_of_a_batch_equals_a_decode_alone(pipeline):
    gate, engine = Gate(pipeline), Engine({"tiny": pipeline}, max_batch=4)
    first = engine.submit(request())
    assert gate.entered.wait(60)
    given = [dict(latents=latents(i), seed=i, sigma=i / 10, steps=2) for i in range(6)]
    given.insert(3, dict(latents=latents(9, 3, 2), seed=9, steps=2))  # of another size, in between
    given.append(dict(latents=latents(8), seed=8, steps=1))
    jobs = [engine.submit(request(**one)) for one in given]
    gate.opened.set()
    images = [job.result(60).image for job in jobs]
    engine.close()
    assert first.done() and engine.batches == {1: 3, 4: 1, 2: 1}
    truth = tiny_pipeline()
    for one, image in zip(given, images, strict=True):
        alone = truth(
            one["latents"], sigma=one.get("sigma", 0.0), num_inference_steps=one["steps"],
            generator=generator(one["seed"]), output_type="latent",
        ).images  # fmt: skip
        assert near(image, alone), one["seed"]


def test_a_picture_is_enlarged_as_by_upscale(engine, pipeline):
    for image in photo(), photo(mode="RGBA"), photo((33, 17), "L"):
        local = pipeline.upscale(
            image, 0.3, noise_generator(5), generator=generator(5), num_inference_steps=1
        ).images[0]  # fmt: skip
        result = engine.submit(request(image=image, sigma=0.3, seed=5, steps=1)).result(60)
        assert result.picture().mode == local.mode and result.picture().tobytes() == local.tobytes()


def test_an_upright_picture_by_its_exif(engine, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "turned.png", exif=exif)
    job = engine.submit(request(image=(tmp_path / "turned.png").read_bytes(), steps=1))
    assert job.result(60).picture().size == (96, 160)


def test_encode(engine, pipeline):
    made = engine.submit(request(image=photo(), encode=True)).result(60)
    assert torch.equal(made.latents, pipeline.encode_image(photo())) and made.image is None


def test_tiles_stay_those_of_one():
    """What is cut alone is cut in the same tiles in a batch: else its numbers would differ."""
    pipeline = tiny_pipeline()
    gate = Gate(pipeline)
    engine = Engine({"tiny": pipeline}, Limits(tile_size=64, tile_overlap=16))
    jobs = [engine.submit(request(latents=latents(i, 4, 3), seed=i)) for i in range(4)]
    gate.opened.set()
    images = [job.result(60) for job in jobs]
    engine.close()
    assert images[3].plan.tiles.count == 6 and sum(count > 1 for count in engine.batches)
    alone = tiny_pipeline()(
        latents(3, 4, 3), generator=generator(3), output_type="latent", tile_size=64, tile_overlap=16
    )
    assert near(images[3].image, alone.images)


def test_a_batch_stays_in_the_memory(pipeline, monkeypatch):
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 2**30)  # which else moves

    def needed(batch):
        return plan(pipeline.transformer, 256, 256, batch, limits=Limits(None, chunk_size=16)).memory

    gate, engine = Gate(pipeline), Engine({"tiny": pipeline}, Limits(None, None, 16, needed(2)))
    blocking = engine.submit(request(steps=1))
    assert gate.entered.wait(60)
    jobs = [engine.submit(request(latents=latents(i, 8, 8), seed=i, steps=1)) for i in range(5)]
    gate.opened.set()
    for job in jobs:
        job.result(60)
    engine.close()
    assert blocking.done() and engine.batches == {1: 2, 2: 2}


def test_progress_and_x0(engine, pipeline):
    gate, seen = Gate(pipeline), []
    blocking = engine.submit(request(steps=1))
    assert gate.entered.wait(60)
    job = engine.submit(request(latents=latents(1), seed=1))
    job.watch(seen.append)
    gate.opened.set()
    image = job.result(60).image
    assert [one.state for one in seen][:2] == ["queued", "running"] and seen[-1].state == "done"
    assert [one.step for one in seen if one.x0 is not None][:1] == [1] and seen[-1].step == seen[-1].steps == 4
    shares = [one.share for one in seen]
    assert shares == sorted(shares) and shares[-1] == 1 and 0.25 in shares
    last = [one.x0 for one in seen if one.x0 is not None][-1]
    assert torch.allclose(last, image, atol=1e-5)  # the last step ends at what it expects
    assert blocking.progress.x0 is None  # nobody watched


def test_x0_of_the_first_step_is_a_decode_in_one(pipeline):
    """A student's first step, from noise at t = 1, expects what a decode in one step returns."""
    noise, seen = torch.randn(1, 3, 64, 64), []
    given = dict(noise=noise, output_type="latent", generator=generator(0))
    pipeline(
        latents(0), sigmas=[1.0, 0.5], callback_on_step_end=lambda p, i, t, x: seen.append(x["x0"]),
        callback_on_step_end_tensor_inputs=["x0"], **given,
    )  # fmt: skip
    assert torch.allclose(seen[0], pipeline(latents(0), num_inference_steps=1, **given).images, atol=1e-5)


def test_cancel_while_it_waits_and_while_it_runs(pipeline):
    gate = Gate(pipeline)
    engine = Engine({"tiny": pipeline}, Limits(tile_size=64, tile_overlap=16))
    running = engine.submit(request(latents=latents(0, 4, 4)))
    assert gate.entered.wait(60)
    waiting = engine.submit(request())
    assert waiting.cancel() and running.cancel() and running.cancel()
    for job in waiting, running:
        with pytest.raises(CancelledError):
            job.result(60)
        assert job.cancelled() and job.progress.state == "cancelled"
    gate.opened.set()
    last = engine.submit(request(latents=latents(1), steps=1))
    assert last.result(60).image is not None and not last.cancel()
    assert gate.passes == 2  # the tile at hand, and the last one's
    engine.close()


def test_one_of_a_batch_is_cancelled(pipeline):
    gate, engine = Gate(pipeline), Engine({"tiny": pipeline})
    blocking = engine.submit(request(steps=1))
    assert gate.entered.wait(60)
    jobs = [engine.submit(request(latents=latents(i), seed=i)) for i in range(2)]
    jobs[0].watch(lambda progress: progress.state == "running" and jobs[0].cancel())
    gate.opened.set()
    assert near(jobs[1].result(60).image, tiny_pipeline()(latents(1), generator=generator(1), output_type="latent")[0])
    assert jobs[0].cancelled() and blocking.done()
    engine.close()


def test_cancelled_through_asyncio(pipeline):
    gate, engine = Gate(pipeline), Engine({"tiny": pipeline})
    job = engine.submit(request())

    async def impatient():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(job), 0.05)

    asyncio.run(impatient())
    assert job.cancelled()
    gate.opened.set()
    engine.close()


def test_one_that_fails_fails_alone(pipeline):
    gate, engine = Gate(pipeline), Engine({"tiny": pipeline})
    blocking = engine.submit(request(steps=1))
    assert gate.entered.wait(60)
    bad = torch.full((16, 2, 2), 3e38)  # finite, and too much for the network
    jobs = [engine.submit(request(latents=one)) for one in (latents(1), bad, latents(2))]
    gate.opened.set()
    assert jobs[0].result(60) and jobs[2].result(60) and blocking.result(60)
    with pytest.raises(ValueError, match="NaN or infinite"):
        jobs[1].result(60)
    assert jobs[1].progress.state == "failed"
    engine.close()


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_at_rest_memory_goes_back(pipeline, monkeypatch):
    monkeypatch.setattr(serving_engine, "REST", 0.1)
    held = psutil.Process().memory_info
    pieces = [torch.ones(25_000) for _ in range(2000)]  # 200 MB in blocks of a heap
    before, pieces = held().rss, pieces[::50]
    assert held().rss > before - 50e6
    engine = Engine({"tiny": pipeline})
    end = time.monotonic() + 60
    while held().rss > before - 100e6 and time.monotonic() < end:
        time.sleep(0.05)
    assert held().rss < before - 100e6
    assert near(engine.submit(request(seed=3)).result(60).image, engine.submit(request(seed=3)).result(60).image)
    engine.close()
    assert all(os.environ[name] for name in serving_engine.KERNELS)


def test_a_full_queue_and_the_end(pipeline):
    gate, engine = Gate(pipeline), Engine({"tiny": pipeline}, queue_size=2, max_batch=1)
    running = engine.submit(request(steps=1))
    assert gate.entered.wait(60)
    waiting = [engine.submit(request(steps=1)) for _ in range(2)]
    with pytest.raises(queue.Full, match="2 requests wait"):
        engine.submit(request())
    assert (engine.waiting, engine.running) == (2, 1)
    waiting[0].cancel()
    waiting.append(engine.submit(request(steps=1)))  # in its place
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.closed:
        pass
    with pytest.raises(ClosedError):
        engine.submit(request())
    gate.opened.set()
    closing.join(60)
    assert running.result(0) and [job.cancelled() for job in waiting] == [True, False, False]


def test_a_latent_model_makes_what_generate_makes():
    latent_model, kwargs = build("Z-Image")
    decoder = tiny_pipeline()
    decoder.register_to_config(latent_space="flux")
    given = dict(decoder="tiny", prompt="a red cat", latent_steps=3, stop_at="2", seed=7, **kwargs)
    truth = generate(
        latent_model, decoder, "a red cat", stop_at=2, seed=7, num_inference_steps=3, **kwargs,
        decoder_kwargs={"output_type": "latent"},
    )  # fmt: skip
    engine = Engine({"tiny": decoder}, latent_model=latent_model)
    result = engine.submit(Request(**given)).result(60)
    assert torch.equal(result.image[0], truth.images[0]) and result.sigma == truth.taken.sigma > 0
    for change, message in (
        (dict(prompt=" "), "expected a prompt"),
        (dict(height=40), "height 40: expected pixels, a multiple of 16"),
        (dict(stop_at="soon"), "stop_at='soon'"),
        (dict(latent_steps=0), "latent_steps 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(**given | change))
    engine.close()


def test_estimate(engine, monkeypatch):
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 0)  # which falls when the engine rests
    small, seconds = engine.estimate(request())
    large, longer = engine.estimate(request(latents=latents(0, 8, 8)))
    assert (large.width, large.height) == (256, 256) and large.memory > small.memory and longer > seconds > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(decoder="other"), 'no decoder "other": expected one of tiny'),
        (dict(latents=None), "expected latents or an image, as there is no latent model"),
        (dict(latents=torch.randn(4, 2, 2)), r"expected latents of shape \(B, 16, h, w\)"),
        (dict(latents=torch.randn(2, 16, 2, 2)), "of one image, got 2"),
        (dict(latents=torch.full((16, 2, 2), float("nan"))), "expected finite latents"),
        (dict(sigma=1.5), r"sigma 1.5: expected a noise level in \[0, 1\]"),
        (dict(sigma=float("nan")), "sigma nan"),
        (dict(seed=-1), "seed -1: expected a whole number"),
        (dict(steps=9), "1 to 4 steps, got 9"),
        (dict(steps=0), "1 to 4 steps, got 0"),
        (dict(image=Image.new("RGB", (8, 80))), "at least 16 x 16 pixels, got 8 x 80"),
        (dict(image=b"GIF89a"), "image: not a readable image"),
    ],
)
def test_bad_requests_are_refused_at_once(engine, given, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**{"decoder": "tiny", "latents": latents(0) if "image" not in given else None} | given))


def test_an_image_too_large_is_refused_by_its_head(pipeline):
    engine = Engine({"tiny": pipeline}, max_pixels=4096)
    assert engine.submit(request(steps=1)).result(60)
    for given in dict(latents=latents(0, 3, 2)), dict(image=photo()):
        with pytest.raises(TooLargeError, match="more than the 4096 pixels"):
            engine.submit(request(**given))
    engine.close()
