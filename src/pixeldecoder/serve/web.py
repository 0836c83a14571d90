"""The web page: pictures, latents or a prompt in; a slider, a file, or a zip of files out."""

import html
import os
import queue
import random
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: it would ask for its newest version

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from pixeldecoder.errors import explain
from pixeldecoder.files import LATENT_SUFFIXES, inspect_latents, load_latents, read_made
from pixeldecoder.latents import SPACES, normalise_file
from pixeldecoder.pictures import SUFFIXES, read, size, to_image
from pixeldecoder.plan import Plan, duration
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.jobs import ClosedError, Job, Progress, Request
from pixeldecoder.serve.results import how_made, license_of, picture_bytes
from pixeldecoder.serve.service import Service

PATH = "/page"
TRIED = 8
"""Files that a batch is judged by."""
SIGMA = (
    "Upscale: noise of this level is added to the picture's latents; more of it invents more, and does not make the "
    "picture better. Decode: the noise that the latents have, by default what their file says; a higher one gives "
    "another image, not a better one. Generate: not asked, as the latent model tells it."
)
THEME = gr.themes.Default().set(  # its own grey is too light to be read
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
)
CSS = """
.gradio-container {max-width: 1400px !important; margin: auto}
.told progress {width: 100%; height: 0.8rem; border: none; background: var(--background-fill-secondary)}
.told progress::-webkit-progress-bar {background: var(--background-fill-secondary)}
.told progress::-webkit-progress-value {background: var(--color-accent)}
.told progress::-moz-progress-bar {background: var(--color-accent)}
.told .wrong {color: var(--error-text-color); font-weight: 600}
:focus-visible {outline: 2px solid var(--color-accent) !important; outline-offset: 2px}
"""
JS = """() => {
    const middle = box => [box.x + box.width / 2, box.y + box.height / 2];
    const move = (handle, pixels) => {
        const [x, y] = middle(handle.getBoundingClientRect());
        const send = (to, kind, x) => to.dispatchEvent(
            new MouseEvent(kind, {clientX: x, clientY: y, bubbles: true, view: window}));
        send(handle, 'mousedown', x); send(window, 'mousemove', x + pixels); send(window, 'mouseup', x + pixels);
    };
    const tell = handle => {
        const box = handle.parentElement.getBoundingClientRect();
        const share = (middle(handle.getBoundingClientRect())[0] - box.x) / box.width;
        handle.setAttribute('aria-valuenow', Math.round(100 * share));
    };
    new MutationObserver(() => {
        for (const handle of document.querySelectorAll('[data-testid=slider]:not([tabindex])')) {
            const facts = {tabindex: 0, role: 'slider', 'aria-label': 'Before and after', 'aria-valuenow': 50};
            for (const name in facts) handle.setAttribute(name, facts[name]);
        }
    }).observe(document.body, {childList: true, subtree: true});
    document.addEventListener('keydown', event => {
        const sign = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (!sign || event.target.dataset?.testid !== 'slider') return;
        event.preventDefault();
        move(event.target, sign * event.target.parentElement.clientWidth / 20);
        requestAnimationFrame(() => tell(event.target));
    });
    document.addEventListener('click', event => {
        const told = document.getElementById('told');
        if (event.target.closest('button.primary') && told.getBoundingClientRect().top > window.innerHeight)
            told.scrollIntoView({behavior: 'smooth'});
    });
}"""
"""What gradio lacks: the slider by the arrow keys, and on a phone the way from the button to what it does."""


def mount(app: FastAPI, service: Service) -> FastAPI:
    """The page of a server, at `PATH`; nothing of it is fetched from another machine."""
    return gr.mount_gradio_app(
        app, page(service.engine), PATH, css=CSS, js=JS, theme=THEME, footer_links=[],
        max_file_size=service.settings.max_bytes, show_error=True, ssr_mode=False, enable_monitoring=False,
    )  # fmt: skip


def page(engine: Engine) -> gr.Blocks:
    """Tabs for what goes in, one set of settings, and one place for what comes out."""
    names, running = list(engine.pipelines), Running(engine)
    reads_text = any(one.transformer.config.text_embed_dim is not None for one in engine.pipelines.values())
    with gr.Blocks(analytics_enabled=False, title="pixeldecoder", delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# pixeldecoder\n{_licenses(engine)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Upscale"):
                        picture = gr.File(label="Picture", file_types=list(SUFFIXES), height=120)
                        upscale, upscale_takes = gr.Button("Upscale", variant="primary"), gr.Markdown()
                    with gr.Tab("Decode"):
                        latents = gr.File(label="Latents", file_types=list(LATENT_SUFFIXES), height=120)
                        decode, decode_takes = gr.Button("Decode", variant="primary"), gr.Markdown()
                    with gr.Tab("Generate", visible=engine.latent_model is not None):
                        text = gr.Textbox(label="What to make", lines=3)
                        with gr.Row():
                            sizes = [
                                gr.Number(0, label=label, precision=0, minimum=0, min_width=90)
                                for label in ("Width", "Height", "Latent steps")
                            ]
                        gr.Markdown("Of the latent model's image, in pixels, and its steps; 0: as it has them.")
                        generate, generate_takes = gr.Button("Generate", variant="primary"), gr.Markdown()
                    with gr.Tab("Batch"):
                        many = gr.File(
                            label="Pictures and latents", file_types=[*SUFFIXES, *LATENT_SUFFIXES], height=160,
                            file_count="multiple",
                        )  # fmt: skip
                        batch, batch_takes = gr.Button("Do all", variant="primary"), gr.Markdown()
                with gr.Group():
                    decoder = gr.Dropdown(names, value=names[0], label="Decoder", visible=len(names) > 1)
                    prompt = gr.Textbox(label="Prompt, for the decoder", visible=reads_text)
                    sigma = gr.Slider(0, 1, 0, step=0.01, label="Sigma", info=SIGMA)
                    steps = gr.Number(
                        0, label="Steps", precision=0, minimum=0, info="0: what the decoder was made for."
                    )
                    seed = gr.Textbox("0", label="Seed")  # a browser's numbers have 53 bits, and seeds 63
                dice = gr.Button("Another seed", size="sm")
                with gr.Accordion("Restore settings", open=False):
                    old = gr.File(label="A picture from here", file_types=[".png", ".webp", ".jpg"], height=100)
            with gr.Column(scale=3, min_width=320):
                told = gr.HTML(elem_id="told", elem_classes="told")
                cancel = gr.Button("Cancel", variant="stop", interactive=False)
                slider = gr.ImageSlider(
                    label="Before and after", buttons=["fullscreen"], interactive=False, max_height=640,
                )  # fmt: skip
                file = gr.DownloadButton("Download", interactive=False)
                made = gr.JSON(label="How it was made", open=True)
        settings = [decoder, prompt, sigma, steps, seed]
        key = gr.State("")
        outputs = [key, told, slider, file, made, cancel]
        same: Any = dict(concurrency_limit=engine.queue_size, show_progress="hidden", api_visibility="private")
        quick: Any = dict(concurrency_limit=16, show_progress="hidden", api_visibility="private")
        sources = {
            "upscale": (picture, upscale, upscale_takes),
            "decode": (latents, decode, decode_takes),
            "generate": (text, generate, generate_takes),
        }
        for command, (source, button, takes) in sources.items():
            inputs: Any = [source, *settings, *(sizes if command == "generate" else [])]

            def run(source: Any, *values: Any, command: str = command) -> Iterator[tuple]:
                yield from running.one(command, source, values)

            def estimate(source: Any, *values: Any, command: str = command) -> str:
                return running.estimate(command, source, values)

            button.click(run, inputs, outputs, **same)
            gr.on([one.change for one in inputs], estimate, inputs, takes, **quick)
        latents.upload(running.sigma, [latents, sigma], sigma, **quick)
        inputs = [many, *settings]
        batch.click(running.many, inputs, outputs, **same)
        gr.on([one.change for one in inputs], running.estimate_many, inputs, batch_takes, **quick)
        cancel.click(running.cancel, key, None, **quick)
        dice.click(lambda: str(random.randrange(2**31)), None, seed, **quick)
        old.upload(running.restore, [old, *settings], [*settings, told, old], **quick)
    return blocks


def _licenses(engine: Engine) -> str:
    """Of the weights that are loaded."""
    lines = []
    for name, pipeline in engine.pipelines.items():
        known = license_of(name, pipeline) or "not told"
        space = pipeline.config.latent_space or f"{pipeline.transformer.config.latent_channels} channels"
        lines.append(f"**{name}**: latents of {space}; licence of its weights: {known}.")
    if engine.latent_model is not None:
        lines.append(f"Latent model: {type(engine.latent_model).__name__} ({engine.latent_space.name}).")
    return " ".join(lines)


class Running:
    """What the page has the engine do."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.jobs: dict[str, Job] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="pixeldecoder-")

    def cancel(self, key: str) -> None:
        if key in self.jobs:
            self.jobs[key].cancel()

    def estimate(self, command: str, source: Any, values: tuple) -> str:
        """What it will take, before anything is done."""
        if not source:
            return ""
        try:
            request = self._request(command, source, values)
            layout, seconds = self.engine.estimate(request)
        except Exception as error:
            return f"⚠️ {_line(error)}"
        tiles = f", in {layout.tiles.count} tiles" if layout.tiled else ""
        latent = ", and the latent model's time" if command == "generate" else ""
        size = self._size(request, layout)
        of = _about(Path(source)) if command == "decode" else ""
        return f"{of}{size}{tiles}, {_takes(layout, seconds)}{latent}"

    def estimate_many(self, paths: list[str] | None, *values: Any) -> str:
        """Of a batch, judged by some of it."""
        if not paths:
            return ""
        told, taken = [f"{len(paths)} files"], []
        for path in map(Path, paths[:: -(-len(paths) // TRIED)]):
            try:
                taken.append(self.engine.estimate(self._one_of_many(path, values)[1]))
            except Exception as error:
                told.append(f"⚠️ {path.name}: {_line(error)}")
        if taken:
            largest = max((layout for layout, _ in taken), key=lambda layout: layout.memory)
            told[0] += f", {_takes(largest, len(paths) * sum(seconds for _, seconds in taken) / len(taken))}"
        return "<br>".join(told)

    def sigma(self, path: str | None, now: float) -> float:
        """What a file says of its latents."""
        try:
            held = load_latents(Path(path or "")).sigma
        except ValueError:  # told by the estimate
            return now
        return now if held is None else float(held[0])

    def restore(self, path: str, *now: Any) -> tuple:
        """The settings of a picture that was made here, or by the command; what it says, and room for the next one."""
        try:
            said = read_made(Path(path))
            values = [
                said.get("decoder"),
                said.get("prompt", ""),
                said.get("sigma"),
                said.get("steps"),
                said.get("seed"),
            ]
            kinds = (str, str, int | float, int, int)
            if not all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True)):
                raise ValueError("its settings are not those of a picture from here")
            if values[0] not in self.engine.pipelines:
                raise ValueError(f"made by the decoder {values[0]}, which is not loaded here")
            self.engine.estimate(replace(_settings(tuple(values)), image=Image.new("RGB", (16, 16))))
        except ValueError as error:
            return (*now, _wrong(error, Path(path).name), None)
        values[4] = str(values[4])
        return (*values, f"Settings of {html.escape(Path(path).name)} restored; give its source again.", None)

    def one(self, command: str, source: Any, values: tuple) -> Iterator[tuple]:
        """One image, with how far it is."""
        key = f"{id(self)}-{random.getrandbits(64):x}"
        clear = (key, "", None, gr.update(value=None, interactive=False), None, gr.update(interactive=False))
        if not source:
            yield (key, '<span class="wrong" role="alert">Nothing is there yet to be done.</span>', *clear[2:])
            return
        said: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        try:
            request = self._request(command, source, values)
            job = self.jobs[key] = self.engine.submit(request, said.put)
        except Exception as error:
            yield (key, _wrong(error), *clear[2:])
            return
        yield (key, _bar(job.progress), *clear[2:5], gr.update(interactive=True))
        folder, x0 = Path(self.folder.name, key), None
        try:
            folder.mkdir()
            before = None if job.checked.picture is None else job.checked.picture.flattened()
            while not job.done():
                try:
                    progress = said.get(timeout=0.5)
                    while not said.empty():
                        progress = said.get()
                except queue.Empty:
                    progress = job.progress
                shown: Any = gr.skip()
                if progress.x0 is not None and progress.x0 is not x0:
                    x0 = progress.x0
                    after = to_image(x0)
                    before = before or after  # of latents: what the first step expects
                    shown = _sides(folder, before, after)
                yield (gr.skip(), _bar(progress), shown, *[gr.skip()] * 3)
            result = job.result()
            picture = result.picture()
            name = "image" if command == "generate" else Path(source).name
            data = b"" if command == "generate" else Path(source).read_bytes()
            facts = self._latent_facts(request) if command == "generate" else {}
            made = how_made(self.engine, request, result, command, name, data, **facts)
            path = folder / f"{Path(name).stem}_{picture.width}x{picture.height}.png"
            path.write_bytes(picture_bytes(picture, "png", made))
            label = f"Done in {duration(result.seconds)}: {picture.width} x {picture.height} px, seed {request.seed}."
            after = read(picture).flattened()
            sides = _sides(folder, before or after, after)
            yield (key, label, sides, gr.update(value=str(path), interactive=True), made, gr.update(interactive=False))
        except CancelledError:
            yield (key, "Cancelled.", *[gr.skip()] * 3, gr.update(interactive=False))
        except Exception as error:
            yield (key, _wrong(error), *clear[2:])
        finally:  # the visitor may have left
            job.cancel()
            self.jobs.pop(key, None)
            shutil.rmtree(folder, ignore_errors=True)  # gradio has made a copy

    def many(self, paths: list[str] | None, *values: Any) -> Iterator[tuple]:
        """Files by the same settings, into a zip; what is wrong with one stops no other."""
        key = f"{id(self)}-{random.getrandbits(64):x}"
        clear = (None, gr.update(value=None, interactive=False), None)
        wrong, done, stopped = [], 0, False
        paths = paths or []
        target = Path(self.folder.name, key, "pictures.zip")
        target.parent.mkdir()
        yield (key, f"0 of {len(paths)}", *clear, gr.update(interactive=True))
        with zipfile.ZipFile(target, "w") as bundle:
            for number, path in enumerate(map(Path, paths), 1):
                try:
                    command, request = self._one_of_many(path, values)
                    job = self.jobs[key] = self._submit(request)
                    while not job.done():
                        progress = (number - 1 + job.progress.share) / len(paths)
                        label = f"{_progress(progress)} {number} of {len(paths)}: {html.escape(path.name)}"
                        yield (gr.skip(), label, *[gr.skip()] * 4)
                        _wait(job)
                    result = job.result()
                    made = how_made(self.engine, request, result, command, path.name, path.read_bytes())
                    name = path.stem if f"{path.stem}.png" not in bundle.namelist() else f"{path.stem}_{number}"
                    bundle.writestr(f"{name}.png", picture_bytes(result.picture(), "png", made))
                    done += 1
                except CancelledError:
                    stopped = True
                    break
                except Exception as error:
                    wrong.append(f"{path.name}: {_line(error)}")
                finally:
                    if key in self.jobs:
                        self.jobs.pop(key).cancel()
            if wrong:
                bundle.writestr("errors.txt", "\n".join(wrong) + "\n")
        label = f"{'Cancelled: ' if stopped else ''}{done} of {len(paths)} made."
        label += "".join(f'<br><span class="wrong" role="alert">{html.escape(line)}</span>' for line in wrong)
        bundled = gr.update(value=str(target), interactive=bool(done))
        yield (key, label, None, bundled, None, gr.update(interactive=False))
        shutil.rmtree(target.parent)  # gradio has made a copy

    def _one_of_many(self, path: Path, values: tuple) -> tuple[str, Request]:
        """A file of a batch, by what it is: its command, and what is asked of the engine."""
        command = "decode" if path.suffix.lower() in LATENT_SUFFIXES else "upscale"
        sigma = self.sigma(str(path), values[2]) if command == "decode" else values[2]
        return command, self._request(command, str(path), (*values[:2], sigma, *values[3:]))

    def _latent_facts(self, request: Request) -> dict[str, Any]:
        """What a picture says of the latent model's run."""
        facts = {
            "description": request.prompt, "model": self.engine.latent_model.config.get("_name_or_path"),
            "height": request.height, "width": request.width, "latent_steps": request.latent_steps,
        }  # fmt: skip
        return {name: value for name, value in facts.items() if value}

    def _submit(self, request: Request) -> Job:
        """As soon as there is room: a batch leaves half of the queue to others."""
        while self.engine.waiting > self.engine.queue_size // 2:
            _wait(None)
        return self.engine.submit(request)

    def _request(self, command: str, source: str, values: tuple) -> Request:
        request, decoder = _settings(values), values[0]
        if command == "generate":
            width, height, steps = (int(value or 0) or None for value in values[5:])
            return replace(request, prompt=source, sigma=0.0, width=width, height=height, latent_steps=steps)
        path = Path(source)
        if command == "upscale":
            return replace(request, image=path.read_bytes())
        held = load_latents(path)
        if len(held.tensor) != 1:
            raise ValueError(f"{path.name} holds {len(held.tensor)} latents: expected those of one image")
        _check_channels(path, held.tensor.shape[1], self.engine, decoder)
        space = self.engine.pipelines[decoder].config.latent_space
        return replace(request, latents=normalise_file(held, space, None, decoder), size=held.size)

    def _size(self, request: Request, layout: Any) -> str:
        if isinstance(request.image, bytes):
            scale = self.engine.pipelines[request.decoder].transformer.config.scale
            return " x ".join(str(scale * side) for side in size(request.image))
        return f"{layout.width} x {layout.height}"


def _settings(values: tuple) -> Request:
    decoder, prompt, sigma, steps, seed = values[:5]
    try:
        seed = int(seed or 0)
    except ValueError:
        raise ValueError(f"seed {seed!r}: expected a whole number from 0 to 2^63 - 1") from None
    return Request(decoder=decoder, prompt=prompt or "", sigma=sigma, steps=int(steps or 0) or None, seed=seed)


def _wait(job: Job | None) -> None:
    if job is None:
        time.sleep(0.2)
    else:
        wait([job], timeout=0.5)


def _takes(layout: Plan, seconds: float) -> str:
    return f"about {layout.memory / 1e9:.1f} GB, about {duration(max(0.1, seconds))}"


def _about(path: Path) -> str:
    """What a file of latents holds, and whose they may be."""
    shape, _ = inspect_latents(path)
    return f"{shape[1]} channels, {shape[3]} x {shape[2]} cells ({_families(shape[1])}): "


def _families(channels: int) -> str:
    return (
        " or ".join(name for name, space in SPACES.items() if space.channels == channels) or "no family that is known"
    )


def _check_channels(path: Path, channels: int, engine: Engine, decoder: str) -> None:
    expected = engine.pipelines[decoder].transformer.config.latent_channels
    if channels != expected:
        raise ValueError(
            f"{path.name} holds latents of {channels} channels ({_families(channels)}), but {decoder} decodes those of "
            f"{expected} ({engine.pipelines[decoder].config.latent_space or _families(expected)})"
        )


def _sides(folder: Path, before: Image.Image, after: Image.Image) -> tuple[str, str]:
    """Of the slider, as files: an image that gradio writes itself, it writes again while a browser reads it."""
    if before.size != after.size:
        before = before.resize(after.size, Image.Resampling.BICUBIC)
    paths = folder / "before.jpg", folder / "after.jpg"
    for path, image in zip(paths, (before, after), strict=True):
        path.write_bytes(picture_bytes(image, "jpg"))
    return str(paths[0]), str(paths[1])


def _progress(share: float) -> str:
    return f'<progress max="1" value="{share:.3f}" aria-label="progress"></progress>'


def _bar(progress: Progress) -> str:
    if progress.state == "queued":
        return f"{_progress(0)} Waiting for its turn"
    left = "" if progress.remaining is None else f", about {duration(max(0.1, progress.remaining))} left"
    return f"{_progress(progress.share)} Step {min(progress.step + 1, progress.steps)} of {progress.steps}{left}"


def _line(error: Exception) -> str:
    if isinstance(error, queue.Full | ClosedError):
        return str(error)
    return explain(error, "") or "something is wrong in the server"


def _wrong(error: Exception, name: str = "") -> str:
    line = f"{name}: {_line(error)}" if name else _line(error)
    return f'<span class="wrong" role="alert">{html.escape(line)}</span>'
