"""Reports in a real browser: Debian's chromium, driven by Playwright."""

import io
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import sync_playwright

from conftest import tiny_pipeline
from pixeldecoder.cli import main
from pixeldecoder.evaluation import figures, report
from pixeldecoder.evaluation.methods import Setting
from pixeldecoder.evaluation.metrics import METRICS

SIDE = 128


@contextmanager
def opened(path):
    """The page; on leaving, that it complained of nothing and asked for nothing but itself."""
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("this test needs a browser: apt-get install chromium")
        pytest.skip("needs chromium")
    complaints, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert not complaints
    assert requests[0] == path.as_uri() and all(url.startswith("data:") for url in requests[1:])


def seen(element) -> np.ndarray:
    """What the element shows, (H, W, 3)."""
    return np.array(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A dark one and a bright one, so that what is seen of each is plain."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, value in (("dark", 40), ("bright", 220)):
        noise = np.random.RandomState(0).randint(-20, 20, (SIDE, SIDE, 3))
        Image.fromarray((value + noise).astype("uint8")).save(folder / f"{name}.png")
    return folder


def test_slider_and_zoom(pictures, tmp_path):
    path = tmp_path / "page.html"
    assert main(["compare", str(pictures / "dark.png"), str(pictures / "bright.png"), "--output", str(path)]) == 0
    with opened(path) as page:
        stage = page.locator(".stage")
        stage.scroll_into_view_if_needed()
        zoom = stage.bounding_box()["width"] / SIDE
        assert zoom == 3

        def bright_share() -> float:
            return (seen(stage).mean(axis=2) > 130).mean()

        assert bright_share() == pytest.approx(0.5, abs=0.02)
        page.locator(".split").fill("20")
        assert bright_share() == pytest.approx(0.8, abs=0.02)
        box = stage.bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
        assert bright_share() == pytest.approx(0.8, abs=0.02)  # nothing moves without a button held
        page.mouse.down()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 50)
        page.mouse.up()
        assert bright_share() == pytest.approx(0.1, abs=0.02)
        page.locator("select.left").select_option("bright.png")
        assert bright_share() > 0.98  # all but the line
        page.locator(".zoom").fill("1")
        assert stage.bounding_box()["width"] == SIDE
        page.locator(".zoom").fill("8")
        assert stage.bounding_box()["width"] == 8 * SIDE and "8x" in page.locator(".controls").inner_text()
        block = seen(stage)[402:407, 202:207]  # inside of one pixel of the picture, enlarged without blur
        assert (block == block[0, 0]).all()


def test_report_of_an_evaluation(pictures, tmp_path):
    output = tmp_path / "out"
    arguments = ["--decoders", "--baselines", "bicubic", "lanczos", "--device", "cpu"]
    assert main(["evaluate", str(pictures), "--output", str(output), *arguments]) == 0
    with opened(output / "report.html") as page:
        assert page.locator(".case").count() == 2 and page.locator("svg").count() == 1
        page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")
        names = page.locator("select.right").first.locator("option").all_inner_texts()
        assert names == ["original", "bicubic", "lanczos", "texture of bicubic"]
        for width in (1280, 400):  # nothing sticks out of a telephone's screen
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


HOSTILE = "a|b <img src=x onerror=alert(1)> [x](y) `c` *d* $e $f \n# g.png"


def test_any_name_is_shown_as_it_is(pictures, tmp_path):
    """Of pictures and of decoders, in the page and in Markdown; and each case opens on the method that it names."""
    (tmp_path / "photos").mkdir()
    shutil.copy(pictures / "dark.png", tmp_path / "photos" / HOSTILE)
    decoders = [tmp_path / name for name in ("_first", "$|<b>*last")]
    for decoder in decoders:
        tiny_pipeline().save_pretrained(decoder)
    output = tmp_path / "out"
    arguments = ["--decoders", *map(str, decoders), "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    assert main(["evaluate", str(tmp_path / "photos"), "--output", str(output), *arguments]) == 0
    with opened(output / "report.html") as page:
        assert page.locator("img[src=x], b").count() == 0
        titles = page.locator("figcaption").all_text_contents()
        assert [title.split(": ")[0] for title in titles] == [f"worst of {d.name}, 1 step, sigma 0" for d in decoders]
        assert all(HOSTILE in title for title in titles)
        rights = page.locator("select.right")
        assert [rights.nth(i).input_value() for i in range(2)] == [f"{d.name}, 1 step, sigma 0" for d in decoders]
        assert [page.locator("select.left").nth(i).input_value() for i in range(2)] == ["original"] * 2
    lines = (output / "report.md").read_text().splitlines()
    assert not [line for line in lines if re.search(r"<(?!img src=x)|(?<!\\)[`*]d|^#* g", line) or "<" in line]
    rows = [line for line in lines if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
    heads = [i for i, line in enumerate(rows) if line.startswith("| --- ")]
    assert heads and all(widths[i - 1 : i + 4] == [widths[i]] * 5 for i in heads)  # bicubic, two decoders
    assert any(r"a\|b &lt;img src=x onerror=alert(1)&gt; \[x\](y) \`c\` \*d\* $e $f \# g.png" in line for line in lines)


def test_a_prompt_opens_on_its_method_against_another(tmp_path):
    """Without a truth, the first method would be compared with itself."""
    picture = Image.new("RGB", (32, 32))
    for main_label, left in (("a", "b"), ("b", "a")):
        case = figures.CropComparison("worst of it", {"a": picture, "b": picture}, main_label)
        context = {"title": "", "summary": "", "tables": [], "cases": [case], "notes": []}
        report._write(tmp_path / "page.html", context)
        with opened(tmp_path / "page.html") as page:
            assert page.locator("select.right").input_value() == main_label
            assert page.locator("select.left").input_value() == left


def drawn(monkeypatch, rows, names) -> Figure:
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    assert figures.plot_scores(rows, [METRICS[name] for name in names]).startswith("<svg")
    return drawn[0]


def test_plots(monkeypatch, recwarn):
    """One colour means one method in all of them, axes have numbers, and the legend lies on nothing."""
    settings = [Setting("bicubic"), Setting("vae", sigma=0.0), Setting("vae", sigma=0.4)]
    settings += [Setting(n, steps, sigma) for n in ("_nano", "$a$b", "絵") for steps in (1, 4) for sigma in (0.0, 0.4)]
    random = np.random.RandomState(0)
    rows = {
        setting: {
            name: {"image": name, "seconds": 0.5 + 0.01 * random.rand(), "psnr": 20 + random.rand()} for name in "abcd"
        }
        for setting in settings
    }
    for row in rows[settings[-1]].values():  # a metric that some settings have not
        row["texture"] = random.rand()
    figure = drawn(monkeypatch, rows, ["psnr", "texture"])
    assert not recwarn.list
    grid = np.array(figure.axes).reshape(2, 3)
    assert [axes.get_xlabel() for axes in grid[1]] == ["steps", "sigma", "seconds (median)"]
    colours: dict[str, set] = {}
    for column in grid.T:
        legend = column[1].get_legend()
        labels = [text.get_text().strip() for text in legend.get_texts()]
        for label, handle in zip(labels, legend.legend_handles, strict=True):
            colours.setdefault(label.split(",")[0], set()).add(tuple(handle.get_color()[0]))
        for axes in column:
            styles = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers]
            assert styles and len(set(styles)) == len(styles)
            box = axes.get_window_extent()
            assert not legend.get_window_extent().overlaps(box) and axes.get_legend() in (None, legend)
            low, high = axes.get_xlim()
            numbers = [tick.get_text() for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
            assert len(numbers) > 1 and all(numbers)
    assert set(colours) == {"bicubic", "VAE + bicubic", "_nano", r"\$a\$b", "絵"}
    assert all(len(of) == 1 for of in colours.values()) and len(set.union(*colours.values())) == len(colours)
    assert len(grid[0, 0].get_legend_handles_labels()[0]) == 0
    points = {tuple(line.get_xdata()) for line in grid[0, 1].lines if len(line.get_xdata()) == 2}
    assert points == {(0.0, 0.4)}  # along sigma, each curve of one number of steps


def test_many_methods_have_many_colours(monkeypatch):
    rows = {Setting(f"m{i}"): {"a": {"image": "a", "seconds": 1.0, "psnr": 20.0 + i}} for i in range(13)}
    (axes,) = drawn(monkeypatch, rows, ["psnr"]).axes
    assert len({tuple(handle.get_color()[0]) for handle in axes.get_legend().legend_handles}) == 13


def test_markers_tell_the_curves_of_a_method_apart():
    assert len(set(figures.MARKERS)) == len(figures.MARKERS)


def test_shown_pictures(pictures, tmp_path):
    """Where the error is largest, and of equals the middle."""
    import torch

    error = torch.zeros(1, 1, 700, 900)
    assert figures._worst_place(error) == (290, 190, 610, 510)
    error[..., 650, 20] = 1
    left, top, right, bottom = figures._worst_place(error)
    assert left <= 20 < right and top <= 650 < bottom and (right - left, bottom - top) == (320, 320)
    assert figures._worst_place(error[..., :100, :50]) == (0, 0, 50, 100)
    truth = torch.zeros(1, 3, 64, 128)
    image = truth.clone()
    image[..., ::2, :32] += 0.2  # invented in the left cells
    seen = np.array(figures.texture_picture(image, truth)).astype(int)
    assert (seen[:, :32, 0] > seen[:, :32, 2] + 50).all() and (seen[:, 64:] == seen[:1, 64:65]).all()
    lost = np.array(figures.texture_picture(truth, image)).astype(int)
    assert (lost[:, :32, 2] > lost[:, :32, 0] + 50).all()


def test_worst_and_best_go_by_the_headline(pictures, tmp_path):
    """The darker one is enlarged worse here, and is named the worst; without a known headline by what there is."""
    for name in ("border", "psnr"):
        output = tmp_path / name
        arguments = ["--decoders", "--baselines", "bicubic", "--device", "cpu", "--metrics", name]
        assert main(["evaluate", str(pictures), "--output", str(output), *arguments]) == 0
        lines = [line for line in (output / "report.md").read_text().splitlines() if line.startswith("**worst")]
        values = [float(line.split("**:")[0].rsplit(" ", 1)[1]) for line in lines]
        assert len(values) == 2
        badness = [METRICS[name].badness(value) for value in values]
        assert badness == sorted(badness, reverse=True) and METRICS[name].title in lines[0]
