"""`pixeldecoder evaluate`, `compare` and `judge` on tiny real components: pictures, shards, prompts, bad input."""

import csv
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image

from conftest import TINY_NANO, tiny_pipeline
from families import build, clip, tokenizer
from pixeldecoder.cli import main
from pixeldecoder.evaluation.judge import verdicts
from pixeldecoder.evaluation.methods import Setting
from pixeldecoder.evaluation.report import interval

CROP = 128


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A decoder, an autoencoder, and five pictures, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline().save_pretrained(folder / "decoder")
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    for index in range(5):
        path = folder / "photos" / ("deep" if index == 4 else "") / f"photo {index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(index).save(path)
    return folder


def photo(seed: int, side: tuple[int, int] = (144, 160)) -> Image.Image:
    noise = np.random.RandomState(seed).rand(9, 10, 3)
    return Image.fromarray((noise * 255).astype("uint8")).resize(side[::-1], Image.Resampling.BICUBIC)


def evaluate(parts, output, *args, source="photos", decoders=("decoder",)):
    names = [str(parts / name) for name in decoders]
    return main(
        ["evaluate", str(parts / source), "--output", str(output), "--decoders", *names, "--device", "cpu",
         "--dtype", "float32", *map(str, args)]
    )  # fmt: skip


def table(output: Path) -> list[dict[str, str]]:
    """Without what differs from run to run."""
    with (output / "results.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def common(parts):
    return ["--crop", CROP, "--baselines", "bicubic", "vae", "--vae", parts / "vae", "--sigmas", "0", "0.4"]


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean") == 0
    return output


def test_table_and_report(parts, finished):
    rows = table(finished)
    kinds = {(Path(r["method"]).name, r["steps"], r["sigma"], r["told"]) for r in rows}
    decoder = {("decoder", s, *t) for s in "12" for t in (("0.0", ""), ("0.4", ""), ("0.4", "0.0"))}
    assert kinds == decoder | {("bicubic", "", "", ""), ("vae", "", "0.0", ""), ("vae", "", "0.4", "")}
    assert len(rows) == 5 * len(kinds)
    assert {(r["seed"], r["crop"], r["scale"]) for r in rows} == {("0", str(CROP), "4")}
    by = {(Path(r["method"]).name, r["steps"], r["sigma"], r["told"], r["image"]): r for r in rows}
    name = "deep/photo 4.png"
    # What the decoder is told matters, so does the noise; and every number is that of the image on disk.
    values = [by["decoder", "2", *k, name]["psnr"] for k in (("0.0", ""), ("0.4", ""), ("0.4", "0.0"))]
    assert len(set(values)) == 3
    row = by["bicubic", "", "", "", name]
    image = np.array(Image.open(finished / "images" / "bicubic" / f"{row['file']}.png")) / 255
    truth = np.array(Image.open(parts / "photos" / name))[8:136, 16:144] / 255
    assert float(row["psnr"]) == pytest.approx(-10 * np.log10(np.square(image - truth).mean()), abs=1e-3)
    report = (finished / "report.md").read_text()
    for text in ("5 images", "decoder, 2 steps, sigma 0.4, told 0", "Texture in flat regions", "worst of decoder", "["):
        assert text in report
    pictures = list((finished / "pictures").iterdir())
    assert pictures and all(f"pictures/{path.name}" in report for path in pictures)
    page = (finished / "report.html").read_text()
    assert "data:image/webp;base64," in page and "<svg" in page


def test_more_of_it_is_added(parts, finished, tmp_path, monkeypatch):
    """Metrics and settings come to what is there, and nothing that is there is made again."""
    import shutil

    import pixeldecoder.evaluation.run as run

    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = table(output)
    made = []
    monkeypatch.setattr(run, "decoder_run", lambda *args: made.append(args))
    for steps in ((), ("--metrics", "psnr", "border")):
        assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean", *steps) == 0
    assert not made
    assert [{key: row[key] for key in after} for row, after in zip(before, table(output), strict=True)] == table(output)
    monkeypatch.undo()
    assert evaluate(parts, output, *common(parts), "--steps", 3) == 0
    assert {row["steps"] for row in table(output)} == {"", "3"}
    assert evaluate(parts, output, *common(parts), "--seed", "1") == 2  # would be another evaluation


def test_killed_and_resumed(parts, finished, tmp_path):
    """A process killed in the middle, and its torn last line, leave what gives the same table."""
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "pixeldecoder", "evaluate", parts / "photos", "--output", output, "--decoders",
        parts / "decoder", "--device", "cpu", "--dtype", "float32", *common(parts), "--steps", 1, 2, "--as-if-clean",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    rows = output / "rows-0.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if rows.exists() and rows.read_bytes().count(b"\n") >= 18:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = rows.read_bytes().count(b"\n")
    assert 18 <= done < 45 and not (output / "results.csv").exists()
    rows.write_bytes(rows.read_bytes()[:-30])
    assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean") == 0
    assert table(output) == table(finished)


def test_two_processes(parts, finished, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "pixeldecoder",
        "evaluate", parts / "photos", "--output", output, "--decoders", parts / "decoder", "--device", "cpu",
        "--dtype", "float32", *common(parts), "--steps", 1, 2, "--as-if-clean",
    ]  # fmt: skip
    threads = str(torch.get_num_threads())  # sums round differently with more
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert {path.name for path in output.glob("rows-*.jsonl")} == {"rows-0.jsonl", "rows-1.jsonl"}
    assert table(output) == table(finished)


def test_shards_and_unreadable_pictures(parts, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for index in range(3):
            buffer = io.BytesIO()
            photo(index).save(buffer, format="png")
            data = buffer.getvalue()[: 2000 if index == 1 else None]
            info = tarfile.TarInfo(f"{index}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    output = tmp_path / "out"
    assert evaluate(tmp_path, output, "--metrics", "psnr", "fid", "hps", source="set.tar", decoders=()) == 0
    assert {row["image"].rsplit(":", 1)[1] for row in table(output)} == {"0", "2"}
    assert {row["crop"] for row in table(output)} == {""}  # whole, but for what is no full cell: 128 x 128
    report = (output / "report.md").read_text()
    assert "set.tar:1: not readable" in report and "hps: skipped: for prompts alone" in report


@pytest.fixture(scope="module")
def upscalers(tmp_path_factory):
    """diffusers' upscale pipelines, with and without a prompt, and a model that spandrel would load."""
    folder = tmp_path_factory.mktemp("upscalers")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8,) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        in_channels=7, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
        cross_attention_dim=32, num_class_embeds=1000, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    StableDiffusionUpscalePipeline(
        vae=vae, text_encoder=clip(), tokenizer=tokenizer(), unet=unet,
        low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(prediction_type="v_prediction"),
    ).save_pretrained(folder / "prompt")  # fmt: skip
    return folder


def test_bad_input(parts, finished, tmp_path, capsys):
    def complaint(*args, **kwargs):
        assert evaluate(parts, kwargs.pop("output", tmp_path / "bad"), *args, **kwargs) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (parts / "empty").mkdir(exist_ok=True)
    (parts / "empty.txt").write_text("\n")
    eight = tmp_path / "eight"
    tiny_pipeline(**TINY_NANO | {"scale": 8, "patch_size": 32}).save_pretrained(eight)
    assert "no usable picture" in complaint(source="empty")
    assert "no such folder" in complaint(source="nowhere")
    assert "a prompt in each line" in complaint("--model", "x", "--baselines", "vae", source="empty.txt")
    assert "is 160 x 144 pixels, smaller than the crop of 192" in complaint("--crop", 192)
    assert "expected a multiple of 64" in complaint("--crop", 100)
    assert "decoder 4x, " in (text := complaint(decoders=("decoder", str(eight)))) and "8x: evaluate them" in text
    assert 'no metric "musik": expected all, psnr' in complaint("--metrics", "musik")
    assert 'no baseline "lanczos3": expected one of bicubic' in complaint("--baselines", "lanczos3")
    assert "needs an autoencoder" in complaint("--baselines", "vae")
    assert "sigma 1.5: expected a noise level in [0, 1]" in complaint("--sigmas", "1.5")
    assert "1 to 4 steps, got 8" in complaint("--steps", 8)
    assert "nothing to evaluate" in complaint("--baselines", decoders=())
    assert "no such file" in complaint("--weights", "squeezenet", tmp_path / "none")
    assert not (tmp_path / "bad" / "images").exists()
    assert "holds an evaluation with crop 128, not 64" in complaint("--crop", 64, output=finished)


def test_prompts(parts, tmp_path):
    """A latent model stopped at several places, its own images as the baseline."""
    pipe, _ = build("Z-Image")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red boat\n\na lighthouse at dusk, 35 mm\n")
    arguments = json.dumps({"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16})
    output = tmp_path / "out"

    def run(*args):
        names = [str(parts / "decoder"), "--source"]
        return main(
            ["evaluate", str(tmp_path / "prompts.txt"), "--output", str(output), "--decoders", names[0], "--model",
             str(tmp_path / "model"), "--pipeline-args", arguments, "--device", "cpu", "--dtype", "float32",
             "--baselines", "vae", *args]
        )  # fmt: skip

    assert run("--stops", "2", "4", "--metrics", "border", "psnr") == 0
    rows = table(output)
    assert [(Path(r["method"]).name, r["stop"]) for r in rows[::2]] == [("vae", ""), ("decoder", "2"), ("decoder", "4")]
    assert {r["image"] for r in rows} == {"a red boat", "a lighthouse at dusk, 35 mm"}
    assert len(list((output / "latents").glob("*.safetensors"))) == 4
    for row in rows:
        setting = Setting(row["method"], int(row["steps"]) if row["steps"] else None, stop=row["stop"] or None)
        from pixeldecoder.evaluation.run import image_path

        assert Image.open(image_path(output, setting, row["file"])).size == (256, 256)
    assert "psnr: skipped: for pictures alone" in (output / "report.md").read_text()
    assert run("--baselines", "bicubic") == 2


def test_upscale_baseline(parts, upscalers, tmp_path, capsys):
    output = tmp_path / "out"
    baseline = f"upscale:{upscalers / 'prompt'}"
    vae = ["--vae", parts / "vae", "--crop", 128, "--metrics", "psnr", "--limit", 1]
    assert evaluate(parts, output, "--baselines", baseline, *vae, decoders=()) == 0
    assert [row["method"] for row in table(output)] == [baseline]
    assert "VAE + prompt, sigma 0" in (output / "report.md").read_text()
    capsys.readouterr()
    assert evaluate(parts, tmp_path / "no", "--baselines", "spandrel:none.pth", *vae, decoders=()) == 2
    assert "baseline spandrel" in capsys.readouterr().err


def test_interval_is_the_bootstrap_of_the_mean():
    values = np.random.RandomState(0).normal(3, 2, 400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)  # the central limit theorem
    assert interval(np.array([2.0])) == (2.0, 2.0)


def test_compare(parts, tmp_path, capsys):
    a, b = parts / "photos" / "photo 0.png", parts / "photos" / "photo 1.png"
    assert main(["compare", str(a), str(b), "--output", str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ms_ssim of photo 1.png: " in lines[0]  # too small for its five scales
    printed = dict(line.split() for line in lines[1:-1])
    expected = -10 * np.log10(np.square(np.array(Image.open(a)) / 255 - np.array(Image.open(b)) / 255).mean())
    assert float(printed["psnr"]) == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "page.html").read_text().count("data:image/webp") == 3
    photo(0, (64, 64)).save(tmp_path / "small.png")
    assert main(["compare", str(a), str(tmp_path / "small.png")]) == 2
    assert "one size, got 160 x 144 and 64 x 64" in capsys.readouterr().err


class Judge(http.server.BaseHTTPRequestHandler):
    """Prefers the brighter image, unless both are alike or it was told to be stubborn; every request is kept."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.server.broken_after is not None and len(self.server.requests) > self.server.broken_after:
            self.send_error(500)
            return
        import base64

        images = [
            np.array(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))).mean()
            for part in body["messages"][0]["content"]
            if part["type"] == "image_url"
        ]
        difference = images[0] - images[1]
        answer = (
            "tie" if abs(difference) < 1 else "first" if difference > 0 or body["model"] == "stubborn" else "second"
        )
        text = f"The first and the second differ.\n**{answer.title()}**"
        content = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.requests, server.broken_after = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_judge(parts, tmp_path, server, monkeypatch, capsys):
    output = tmp_path / "out"
    vae = ["--vae", parts / "vae", "--baselines", "bicubic", "lanczos", "vae", "--metrics", "psnr"]
    assert evaluate(parts, output, *vae, decoders=()) == 0
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    url = f"http://127.0.0.1:{server.server_port}/v1"

    def run(*args, model="brightness"):
        return main(["judge", str(output), "--url", url, "--model", model, *args])

    server.broken_after = 7
    assert run() == 2
    assert f"the judge at {url} does not answer" in capsys.readouterr().err
    server.broken_after = None
    assert run() == 0
    # Three pairs, five images, both orders; the seven answers from before were not asked again.
    assert len(server.requests) == 30 + 1
    path, key, body = server.requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sesame", "brightness")
    orders = [
        [part["text"] for part in r[2]["messages"][0]["content"] if part["type"] == "text"] for r in server.requests
    ]
    assert all(texts[1:] == ["The first:", "The second:"] for texts in orders)
    report = (output / "report.md").read_text()
    assert "Preferred by brightness" in report
    assert "| bicubic against lanczos | 0.500 [0.500, 0.500] | 0 | 5 | 0 | 0 |" in report
    answers = [json.loads(line) for line in (output / "judge.jsonl").read_text().splitlines()]
    means = {
        name: np.array([np.array(Image.open(p)).mean() for p in sorted((output / "images" / name).iterdir())])
        for name in ("bicubic", "VAE_bicubic_sigma_0")
    }
    brighter = (means["bicubic"] > means["VAE_bicubic_sigma_0"]).mean()
    assert verdicts(answers)["bicubic", "VAE + bicubic, sigma 0"]["score"].mean() == brighter
    # Whoever always says the same place has no preference.
    assert run("--settings", "bicubic", "VAE + bicubic, sigma 0", model="stubborn") == 0
    assert (
        "| bicubic against VAE + bicubic, sigma 0 | 0.500 [0.500, 0.500] | 0 | 5 | 0 | 5 |"
        in (output / "report.md").read_text()
    )
    assert run("--settings", "bicubic", "nobody") == 2 and "no setting ['nobody']" in capsys.readouterr().err
    assert main(["judge", str(tmp_path), "--url", url, "--model", "x"]) == 2
    assert "expected the folder of a finished evaluation" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    assert run(model="another") == 2
    assert "does not answer" in capsys.readouterr().err
