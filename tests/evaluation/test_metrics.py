"""Metrics against scikit-image, against networks built from layers, and against what is known of a picture."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save_file
from skimage import color
from skimage import metrics as reference
from torch import nn

from families import SqueezeNet
from pixeldecoder.evaluation.metrics import METRICS, find_metrics, load_metrics, measure
from pixeldecoder.evaluation.perceptual import LPIPS, SqueezeNetDistance
from pixeldecoder.evaluation.pixels import border, ciede2000, grid, spectral_error, texture, texture_map
from pixeldecoder.pictures import psnr, to_tensor
from pixeldecoder.presets import NANO


def test_distance(tmp_path):
    network = SqueezeNet()
    save_file(network.state_dict(), tmp_path / "squeezenet.safetensors")
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1

    def features(x):
        x = (x * 127.5 + 127.5)[:, [2, 1, 0]] - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
        for number, layer in enumerate(network.features):
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
            if number == 12:
                yield x

    layers = [
        (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
        for x, y in zip(features(a), features(b), strict=True)
    ]
    distance = SqueezeNetDistance(tmp_path / "squeezenet.safetensors")
    assert len(layers) == 4
    torch.testing.assert_close(distance(a, b), sum(layers) / 4)
    assert distance(a, a).abs().max() == 0


def photo_pairs():
    """8-bit photos, and what noise, a colour cast and blur make of them; noise too, which has every colour."""
    pairs = []
    for path in sorted((NANO / "samples").glob("*.safetensors"))[:2]:
        photo = to_tensor(Image.open(path.with_suffix(".webp")))[..., :256, :224]
        noisy = photo + 0.1 * torch.randn(photo.shape)
        cast = photo * torch.tensor([0.9, 1.0, 1.1])[:, None, None]
        blurred = F.avg_pool2d(photo, 3, stride=1, padding=1)
        pairs += [(photo, other) for other in (noisy, cast, blurred)]
    pairs.append((torch.rand(1, 3, 256, 224) * 2 - 1, torch.rand(1, 3, 256, 224) * 2 - 1))
    return [[((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1 for x in pair] for pair in pairs]


def test_equal_to_scikit_image():
    scores, skipped = load_metrics(find_metrics((), {}), torch.device("cpu"), {})
    assert not skipped
    window = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for truth, image in photo_pairs():
        ours = {name: score(image, truth, "") for name, score in scores.items()}
        a, b = ((x[0].permute(1, 2, 0).double().numpy() + 1) / 2 for x in (image, truth))
        ya, yb = (color.rgb2ycbcr(x)[..., 0] / 255 for x in (a, b))
        difference = color.deltaE_ciede2000(color.rgb2lab(a), color.rgb2lab(b))
        means = [x.reshape(16, 16, 14, 16, 3).mean(axis=(1, 3)) for x in (a, b)]
        assert ours["psnr"] == pytest.approx(reference.peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)
        assert ours["psnr_y"] == pytest.approx(reference.peak_signal_noise_ratio(ya, yb, data_range=1), abs=1e-4)
        assert ours["ssim"] == pytest.approx(reference.structural_similarity(a, b, channel_axis=2, **window), abs=1e-4)
        assert ours["ssim_y"] == pytest.approx(reference.structural_similarity(ya, yb, **window), abs=1e-4)
        assert ours["ciede2000"] == pytest.approx(difference.mean(), abs=1e-4)
        shift = color.deltaE_ciede2000(*(color.rgb2lab(x) for x in means)).mean()
        assert ours["colour_shift"] == pytest.approx(shift, abs=1e-4)


def test_ciede2000_of_greys_and_equals():
    black, white = torch.full((1, 3, 4, 4), -1.0), torch.ones(1, 3, 4, 4)
    assert ciede2000(white, white).abs().max() < 1e-5
    torch.testing.assert_close(ciede2000(black, white), torch.full((1, 4, 4), 100.0), atol=1e-3, rtol=0)


def test_texture_tells_where_it_was_invented():
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(1, 3, 96, 192)
    truth[..., 96:] += 0.3 * torch.randn(1, 1, 96, 96, generator=generator)  # textured on the right, flat on the left
    noise = 0.05 * torch.randn(1, 1, 96, 192, generator=generator)
    dirty, smooth = truth.clone(), truth.clone()
    dirty[..., :96] += noise[..., :96]
    smooth[..., 96:] *= 0.5
    assert texture(truth, truth) == 0
    assert texture(dirty, truth, "flat") > 20 and abs(texture(dirty, truth, "textured")) < 0.2
    assert texture(smooth, truth, "textured") == pytest.approx(20 * math.log10(0.5), abs=0.1)
    ours, true = texture_map(dirty, truth)
    assert ours.shape == (3, 6)
    assert (ours[:, :2] / true[:, :2] > 100).all() and (ours[:, 4:] / true[:, 4:]).sub(1).abs().max() < 0.05
    assert math.isnan(texture(truth[..., 96:], truth[..., 96:], "flat"))


@pytest.mark.parametrize(("deviation", "where"), [(2.45, "flat"), (2.55, "textured")])
def test_flat_is_below_two_and_a_half_of_255(deviation, where):
    """A chessboard, all of which is high frequency; luma spans 219 of 255. The noise of 8 bits counts, too."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    amplitude = math.sqrt(deviation**2 - 1 / 12) * 2 / 219
    truth = (board * amplitude).expand(1, 3, -1, -1)
    other = {"flat": "textured", "textured": "flat"}[where]
    assert texture(truth * 10, truth, where) > 19 and math.isnan(texture(truth * 10, truth, other))


def test_spectral_error_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    noise = 0.2 * torch.randn(1, 1, 256, 256, generator=generator).expand(-1, 3, -1, -1)
    twice = 20 * math.log10(2)
    assert spectral_error(2 * noise + 0.1, noise) == pytest.approx(twice, abs=0.01)  # brightness is no detail
    # A wave in the middle of one band of the 32, 4 of 256 cycles each, changes this alone.
    wave = torch.cos(2 * math.pi * 42 / 256 * torch.arange(256)).expand_as(noise)
    weak, strong = noise / 100 + wave / 4, noise / 100 + wave / 2
    assert spectral_error(strong, weak) == pytest.approx(twice / 32, rel=0.02)
    # The edges of a ramp are no detail, either: a Hann window's side lobes are low.
    ramp = torch.linspace(-0.5, 0.5, 256).expand_as(noise)
    assert spectral_error(ramp, torch.zeros_like(ramp)) < 4
    # Without any detail there is the rounding to 8 bits, 1/12 of a step squared, in every band.
    step = 255 * 2 / 219 * math.sqrt(1 / 12) / 255
    rough = step * torch.randn(1, 1, 512, 512, generator=generator).expand(-1, 3, -1, -1)
    assert spectral_error(rough, torch.zeros_like(rough)) == pytest.approx(10 * math.log10(2), abs=0.1)


def test_border_and_psnr_in_closed_form():
    steps = torch.where(torch.arange(1, 64) % 16 == 0, 3.0, 1.0)
    profile = torch.cat([torch.zeros(1), steps.cumsum(0)])
    picture = (profile + profile[:, None]).expand(1, 3, -1, -1) / 1000
    assert border(picture) == pytest.approx(3, rel=1e-3)
    assert grid(picture, 16) == pytest.approx(3 / (18 / 16), rel=1e-3)  # a difference of 3 and 15 of 1
    assert psnr(picture, picture) == pytest.approx(100)
    assert psnr(picture + 0.02, picture) == pytest.approx(40, abs=1e-3)  # 1 % of the range


def test_measure_tells_what_it_cannot(capsys):
    image = torch.zeros(1, 3, 8, 8)
    assert measure("x", lambda *args: 2.5, image, image, "", "a.png") == 2.5
    assert measure("x", lambda *args: math.nan, image, image, "", "a.png") is None
    assert capsys.readouterr().out == ""
    assert measure("x", lambda *args: {}["y"], image, image, "", "a.png") is None
    assert capsys.readouterr().out == "x of a.png: KeyError: 'y'\n"


def test_spectral_error_and_border():
    (scores, _), truth = load_metrics(find_metrics((), {}), torch.device("cpu"), {}), photo_pairs()[0][0]
    spectral = scores["spectral_error"]
    assert spectral(truth, truth, "") == 0
    square = truth[..., :224, :224]
    assert spectral(square.transpose(-1, -2), square, "") < 1e-3  # the same frequencies elsewhere
    blurred = F.avg_pool2d(truth, 3, stride=1, padding=1)
    assert spectral(blurred, truth, "") > spectral(0.3 * blurred + 0.7 * truth, truth, "") > 0.1
    noise = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    tiled = noise + torch.randn(1, 3, 10, 10).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert border(noise) == pytest.approx(1, abs=0.05) and border(tiled) > 1.2 > 1.05 > grid(noise)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips(tmp_path, net):
    """Against torchvision's networks built from layers, and the published formula."""
    if net == "alex":
        shapes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        plan, linears = "cRpcRpcRcRcR", [64, 192, 384, 256, 256]  # R: a ReLU whose output is compared
    else:
        widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
        shapes = [(a, b, 3, 1, 1) for a, b in itertools.pairwise(widths)]
        plan, linears = "crcRpcrcRpcrcrcRpcrcrcRpcrcrcR", [64, 128, 256, 512, 512]
    convs = iter(shapes)
    made = {"p": lambda: nn.MaxPool2d(3 if net == "alex" else 2, 2), "r": nn.ReLU}
    layers = []
    for part in plan:
        if part == "c":
            inputs, outputs, kernel, stride, padding = next(convs)
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding))
        else:
            layers.append(made[part.lower()]())
    network = nn.Sequential(*layers)
    weights = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(linears)}
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, tmp_path / "net.pth")
    save_file(weights, tmp_path / "linear.safetensors")
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1

    def features(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        for part, layer in zip(plan, network, strict=True):
            x = layer(x)
            if part == "R":
                yield F.normalize(x, dim=1)

    with torch.no_grad():
        expected = sum(
            ((x - y).square() * linear[0]).sum(1).mean((1, 2))
            for x, y, linear in zip(features(a), features(b), weights.values(), strict=True)
        )
    metric = LPIPS(tmp_path / "net.pth", tmp_path / "linear.safetensors")
    torch.testing.assert_close(metric(a, b), expected, rtol=1e-4, atol=1e-5)
    assert metric(a, a).abs().max() == 0
    save_file({name: weight[:, :3] for name, weight in weights.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made for another network"):
        LPIPS(tmp_path / "net.pth", tmp_path / "other.safetensors")


def test_names_and_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match='no metric "psnrr": expected all, psnr, '):
        find_metrics(["psnrr"], {})
    assert {m.name for m in find_metrics((), {})} == {name for name, m in METRICS.items() if m.light}
    assert [m.name for m in find_metrics(["psnr"], {"squeezenet": tmp_path})] == ["psnr", "squeezenet"]
    scores, skipped = load_metrics(find_metrics(["all"], {}), torch.device("cpu"), {})
    assert scores.keys() | skipped.keys() == METRICS.keys() and not scores.keys() & skipped.keys()
    assert "--weights squeezenet PATH" in skipped["squeezenet"]
    with pytest.raises(ValueError, match="no such file"):
        load_metrics([], torch.device("cpu"), {"squeezenet": tmp_path / "none"})


def test_letters_kept(capsys):
    """Those of the truth's lines, where they stand; a picture without any has no share."""
    page = Image.new("RGB", (400, 160), "white")
    for y, text in (20, "HELLO WORLD"), (90, "reading 1234"):
        ImageDraw.Draw(page).text((20, y), text, font=ImageFont.load_default(size=40), fill="black")
    truth, score = to_tensor(page), load_metrics([METRICS["letters"]], torch.device("cpu"), {})[0]["letters"]
    first = truth.clone()
    first[..., 80:, :] = 1  # without the second line
    blurred = to_tensor(page.filter(ImageFilter.GaussianBlur(14)))
    swapped = truth.roll(70, dims=-2)  # its lines stand elsewhere
    shares = [measure("letters", score, x, truth, "", "page") for x in (truth, first, blurred, swapped)]
    assert shares[0] == 1 and shares[1] == pytest.approx(10 / 21) and shares[2] < 0.2 and shares[3] < 0.5
    assert measure("letters", score, truth, torch.ones_like(truth), "", "blank") is None
    assert measure("letters", score, first, first, "", "another") == 1 and not capsys.readouterr().out
