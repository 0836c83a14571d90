"""Tiny models of ComfyUI's own classes. Run by `test_comfyui.py` in ComfyUI's folder: latents captured from its
samplers are what its model was given; and how its families normalise a LATENT."""

import importlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path.cwd()), str(Path(__file__).parents[1] / "integrations")]
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise  # noqa: E402

nodes = importlib.import_module("comfyui.nodes")
logic = importlib.import_module("comfyui.logic")

MODELS = {
    "flux": supported.Flux(
        dict(
            image_model="flux", guidance_embed=True, in_channels=16, out_channels=16, vec_in_dim=16, context_in_dim=16,
            hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 4, 8], theta=10000,
            patch_size=2, qkv_bias=True, txt_ids_dims=[], dtype=torch.float32,
        )
    ),
    "sdxl": supported.SDXL(
        dict(
            image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
            transformer_depth=[0, 1], transformer_depth_middle=1, transformer_depth_output=[0, 0, 1, 1], context_dim=16,
            use_linear_in_transformer=True, num_head_channels=16, adm_in_channels=16 + 6 * 256,
            num_classes="sequential", use_spatial_transformer=True, legacy=False, use_temporal_attention=False,
            dtype=torch.float32,
        )
    ),
}  # fmt: skip


FAMILIES = {
    "flux": ("Flux", "ZImage", "Chroma", "Boogu"),
    "sd3": ("SD3",),
    "sdxl": ("SDXL",),
    "qwenimage": ("QwenImage", "Krea2", "Anima", "WAN21_T2V"),
    "flux2": ("Flux2", "ErnieImage"),
}
"""ComfyUI's classes, by the space of the decoder that takes their latents."""


def process_in(name: str) -> list[float]:
    """What a class makes of 2 x - 1, x = 0, 1 / C, ... by channel."""
    form = getattr(supported, name).latent_format()
    z = 2 * torch.arange(form.latent_channels) / form.latent_channels - 1
    return form.process_in(z.reshape(1, -1, *[1] * form.latent_dimensions)).flatten().tolist()


@torch.no_grad()
def tiny(space: str) -> tuple[comfy.model_patcher.ModelPatcher, list]:
    """A model of random weights, and a prompt for it."""
    torch.manual_seed(0)
    model = MODELS[space].get_model({}, "")
    for parameter in model.diffusion_model.parameters():  # ComfyUI leaves them as they are
        parameter.data = torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5
    cpu = torch.device("cpu")
    text = [[torch.randn(1, 6, 16), {"pooled_output": torch.randn(1, 16), "guidance": 3.5}]]
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu), text


@torch.no_grad()
def run(space: str, sampler: str, step: int, steps: int = 5) -> dict[str, float]:
    patcher, text = tiny(space)
    model = patcher.model
    seen: list[tuple[float, torch.Tensor]] = []

    def record(apply, given):
        seen.append((float(given["timestep"][0]), given["input"][:1].clone()))
        return apply(given["input"], given["timestep"], **given["c"])

    patcher.set_model_unet_function_wrapper(record)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(text, text)
    sigmas = comfy.samplers.calculate_sigmas(model.model_sampling, "simple", steps)
    latent = {"samples": torch.zeros(1, model.latent_format.latent_channels, 4, 8)}
    noise = Noise_RandomNoise(7)
    taken, level = nodes.CaptureLatent.execute(
        noise, guider, comfy.samplers.sampler_object(sampler), sigmas, latent, step
    ).args
    stopped = len(seen)
    seen.clear()
    finished = guider.sample(
        noise.generate_noise(latent), latent["samples"], comfy.samplers.sampler_object(sampler), sigmas, seed=7,
        disable_pbar=True,
    )  # fmt: skip
    sigma = float(sigmas[step])
    if step == steps:
        truth, exact = model.process_latent_in(finished), 0.0
    else:
        # The last: samplers of second order try a step before they make it.
        truth = [x for told, x in seen if abs(told - sigma) < 1e-4 * max(1, sigma)][-1]
        exact = sigma if space == "flux" else sigma / (1 + sigma**2) ** 0.5
    total = 1.0 if space == "flux" else (1 + sigma**2) ** 0.5
    own = model.process_latent_in(taken["samples"]) * total
    return dict(
        difference=float((own - truth).abs().max() / truth.abs().max()), sigma=level - exact,
        told=taken[logic.CAPTURED]["sigma"] - level, fewer=stopped < len(seen) or step > steps - 2,
    )  # fmt: skip


if __name__ == "__main__":
    cases = [("flux", "euler", 5), ("flux", "euler", 2), ("flux", "dpmpp_2m", 3), ("flux", "heun", 2)]
    cases += [("sdxl", "euler", 2), ("sdxl", "euler_ancestral", 3), ("sdxl", "dpmpp_2m_sde", 2)]
    cases += [("sdxl", "heun", 3), ("sdxl", "lcm", 4), ("sdxl", "ddim", 5)]
    results = {}
    for space, sampler, step in cases:
        results[f"{space} {sampler} {step}"] = run(space, sampler, step)
    for sampler, step in ("dpm_adaptive", 2), ("uni_pc", 2), ("euler", 9):
        try:
            run("flux", sampler, step)
        except ValueError as error:
            results[f"bad {sampler} {step}"] = str(error)
    results["latents"] = {space: {name: process_in(name) for name in names} for space, names in FAMILIES.items()}
    print(json.dumps(results))
