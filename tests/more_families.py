"""The rest of diffusers' pipelines that share a latent space with a released decoder, on tiny random components."""

import inspect
import math
import sys

import numpy as np
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLWan,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    CosmosTransformer3DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    Flux2KleinAutoBlocks,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux3AutoBlocks,
    Flux3Transformer2DModel,
    FluxAutoBlocks,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky5I2IPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImageAutoBlocks,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SD3ControlNetModel,
    StableDiffusion3AutoBlocks,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLControlNetXSPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImageAutoBlocks,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
)
from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
from diffusers.pipelines.kolors.pipeline_kolors_img2img import KolorsImg2ImgPipeline
from diffusers.pipelines.pag.pipeline_pag_kolors import KolorsPAGPipeline
from PIL import Image

from families import (
    DYNAMIC,
    SIZE,
    flow,
    flux,
    kl,
    kl_flux2,
    kl_qwen,
    klein,
    qwen3,
    qwen_image,
    sd3,
    sdxl,
    tokenizer,
    z_image,
)

FLUX = (16, 0.3611, 0.1159)
SDXL = (4, 0.13025, None)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8))


MASKED = dict(image=PICTURE, mask_image=PICTURE.convert("L").point(lambda x: 255 * (x > 127)), strength=1.0)


def embeds(width: int, tokens: int = 6, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(3))


def mask(tokens: int = 6) -> torch.Tensor:
    return torch.ones(1, tokens, dtype=torch.int64)


def flux_transformer(channels: int = 64, out: int | None = None) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=channels, out_channels=out, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip


TINY = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)
AXES = dict(axes_dims_rope=(4, 4, 8))
FLUX_TEXT = dict(prompt_embeds=embeds(32), pooled_prompt_embeds=embeds(32)[:, 0])


def of_flux(kind, transformer=None, **more):
    parts = flux().components
    parts = {name: parts[name] for name in ("scheduler", "vae", "transformer")}
    nothing = dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    return kind(**parts | nothing | ({} if transformer is None else {"transformer": transformer}) | more)


def flux_kontext():
    return of_flux(FluxKontextPipeline), dict(FLUX_TEXT, image=PICTURE, max_area=32 * 64, _auto_resize=False)


def flux_kontext_inpaint():
    return of_flux(FluxKontextInpaintPipeline), dict(FLUX_TEXT, **MASKED, max_area=32 * 64, _auto_resize=False)


def flux_fill():
    # Latents, masked latents, and the mask's 8 x 8 pixels to a cell.
    fill = flux_transformer(64 + 64 + 4 * 64, 64)
    return of_flux(FluxFillPipeline, fill), dict(FLUX_TEXT, image=PICTURE, mask_image=PICTURE.convert("L"))


def flux_control():
    return of_flux(FluxControlPipeline, flux_transformer(128, 64)), dict(FLUX_TEXT, control_image=PICTURE)


def flux_controlnet():
    net = FluxControlNetModel(in_channels=64, pooled_projection_dim=32, guidance_embeds=True, **TINY, **AXES)
    return of_flux(FluxControlNetPipeline, controlnet=net), dict(FLUX_TEXT, control_image=PICTURE)


def flux_image():
    return of_flux(FluxImg2ImgPipeline), dict(FLUX_TEXT, image=PICTURE, strength=1.0)


def flux_inpaint():
    return of_flux(FluxInpaintPipeline), dict(FLUX_TEXT, **MASKED)


def of_qwen(kind, **more):
    parts = qwen_image().components
    parts["text_encoder"] = parts["tokenizer"] = None
    return kind(**parts | more)


QWEN_TEXT = dict(prompt_embeds=embeds(16), prompt_embeds_mask=mask())


def qwen_edit():
    pipe = of_qwen(QwenImageEditPipeline, processor=None)
    return pipe, dict(QWEN_TEXT, image=PICTURE)


def qwen_edit_plus():
    """Of several images, -2509 and -2511."""
    pipe = of_qwen(QwenImageEditPlusPipeline, processor=None)
    return pipe, dict(QWEN_TEXT, image=[PICTURE, PICTURE])


def qwen_image_to_image():
    return of_qwen(QwenImageImg2ImgPipeline), dict(QWEN_TEXT, image=PICTURE, strength=1.0)


def qwen_controlnet():
    net = QwenImageControlNetModel(
        in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return of_qwen(QwenImageControlNetPipeline, controlnet=net), dict(QWEN_TEXT, control_image=PICTURE)


def sd3_controlnet():
    pipe = sd3()
    config = pipe.transformer.config
    keys = (
        "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
    )  # fmt: skip
    net = SD3ControlNetModel(**{key: config[key] for key in keys})
    return StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net), dict(
        prompt="a cat", control_image=PICTURE
    )


def sd3_image():
    return StableDiffusion3Img2ImgPipeline(**sd3().components), dict(prompt="a cat", image=PICTURE, strength=1.0)


def sdxl_controlnet():
    pipe = sdxl()
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    pipe = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=net, add_watermarker=False)
    return pipe, dict(prompt="a cat", image=PICTURE)


def sd3_inpaint():
    parts = sd3().components
    return StableDiffusion3InpaintPipeline(**parts), dict(prompt="a cat", **MASKED)


def sdxl_inpaint():
    return StableDiffusionXLInpaintPipeline(**sdxl().components, add_watermarker=False), dict(prompt="a cat", **MASKED)


def qwen_inpaint():
    return of_qwen(QwenImageInpaintPipeline), dict(QWEN_TEXT, **MASKED)


def z_image_inpaint():
    return ZImageInpaintPipeline(**z_image().components), dict(prompt="a cat", **MASKED)


def klein_kv():
    parts = klein().components
    return Flux2KleinKVPipeline(**parts, is_distilled=True), dict(prompt="a cat", text_encoder_out_layers=(1, 2, 3))


def klein_inpaint():
    given = dict(prompt="a cat", text_encoder_out_layers=(1, 2, 3), **MASKED)
    return Flux2KleinInpaintPipeline(**klein().components, is_distilled=True), given


def z_image_from_image():
    return ZImageImg2ImgPipeline(**z_image().components), dict(prompt="a cat", image=PICTURE, strength=1.0)


def lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=4, in_channels=16, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip
    text = dict(prompt_embeds=embeds(32), prompt_attention_mask=mask(), guidance_scale=1.0)
    return Lumina2Pipeline(transformer, flow(), kl(*FLUX), None, None), text


def hidream():
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=(0, 1),
    ).eval()  # fmt: skip
    text = dict(
        prompt_embeds_t5=embeds(32), prompt_embeds_llama3=embeds(16)[None].expand(2, -1, -1, -1),
        pooled_prompt_embeds=embeds(64)[:, 0], guidance_scale=0.0,
    )  # fmt: skip
    pipe = HiDreamImagePipeline(flow(), kl(*FLUX), *[None] * 8, transformer)
    pipe.default_sample_size = 4  # it makes every image of about so many pixels
    return pipe, text | dict(height=64, width=64)


def kandinsky5():
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=16, in_text_dim2=32, time_dim=16, out_visual_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8), attention_type="regular",
    )  # fmt: skip
    text = dict(
        prompt_embeds_qwen=embeds(16), prompt_embeds_clip=embeds(32)[:, 0],
        prompt_cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), guidance_scale=1.0,
    )  # fmt: skip
    return Kandinsky5T2IPipeline(transformer, kl(*FLUX), None, None, None, None, flow()), text


def kandinsky5_image():
    pipe, text = kandinsky5()
    config = dict(pipe.transformer.config) | dict(visual_cond=True)
    transformer = Kandinsky5Transformer3DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    return Kandinsky5I2IPipeline(transformer, pipe.vae, None, None, None, None, flow()), text | dict(image=PICTURE)


def prx():
    transformer = PRXTransformer2DModel(
        in_channels=16, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[8, 8]
    )
    text = dict(prompt_embeds=embeds(32), prompt_attention_mask=mask().bool(), use_resolution_binning=False)
    return PRXPipeline(transformer, flow(), None, None, kl(*FLUX)), dict(text, guidance_scale=1.0)


def ernie():
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, text_in_dim=32, rope_axes_dim=(4, 4, 8)
    )
    text = dict(prompt_embeds=[embeds(32)[0]], guidance_scale=1.0, use_pe=False)
    return ErnieImagePipeline(transformer, kl_flux2(), None, None, flow()), text


def bria_fibo2():
    transformer = BriaFibo2Transformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4,
        gist_max_text_len=16, axes_dims=(4, 4, 8), axes_lens=(64, 64, 64),
    )  # fmt: skip
    layers = torch.stack([embeds(32), embeds(32)], dim=1)
    text = dict(prompt_embeds=layers, prompt_embeds_mask=mask(), guidance_scale=1.0)
    return BriaFibo2Pipeline(transformer, flow(), kl_flux2(), None, None), text


def kolors():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=4,
        projection_class_embeddings_input_dim=8 * 6 + 32, encoder_hid_dim=32, encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    betas = dict(beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear")
    scheduler = EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    pipe = KolorsPipeline(kl(*SDXL), None, None, unet, scheduler)
    text = dict(
        prompt_embeds=embeds(32), pooled_prompt_embeds=embeds(32)[:, 0], negative_prompt_embeds=embeds(32),
        negative_pooled_prompt_embeds=embeds(32)[:, 0],
    )  # fmt: skip
    return pipe, text


def pixart_sigma():
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=16,
        caption_channels=32, use_additional_conditions=False, norm_num_groups=4,
    )  # fmt: skip
    text = dict(
        prompt_embeds=embeds(32), prompt_attention_mask=mask(), negative_prompt=None, guidance_scale=1.0,
        use_resolution_binning=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(None, None, kl(*SDXL), transformer, DPMSolverMultistepScheduler()), text


def hunyuan_dit():
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=16, hidden_size=16,
        num_layers=2, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=6,
        text_len_t5=6, activation_fn="gelu-approximate",
    )  # fmt: skip
    text = {
        f"{kind}prompt_{what}{number}": embeds(32) if what == "embeds" else mask()
        for kind in ("", "negative_")
        for what in ("embeds", "attention_mask")
        for number in ("", "_2")
    }
    pipe = HunyuanDiTPipeline(kl(*SDXL), None, None, transformer, DDPMScheduler(), None, None, False, None, None)
    return pipe, dict(text, use_resolution_binning=False)


def aura_flow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    text = dict(prompt_embeds=embeds(32), prompt_attention_mask=mask(), guidance_scale=1.0)
    return AuraFlowPipeline(None, None, kl(*SDXL), transformer, flow(shift=1.73)), text


def omnigen():
    transformer = OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1,
        pad_token_id=0, vocab_size=1000, time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]}, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = OmniGenPipeline(transformer, flow(invert_sigmas=True, num_train_timesteps=1), kl(*SDXL), tokenizer(512))
    return pipe, dict(prompt="a cat")


def lumina():
    transformer = LuminaNextDiT2DModel(
        sample_size=4, hidden_size=32, num_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        cross_attention_dim=32,
    )  # fmt: skip
    text = dict(prompt_embeds=embeds(32), prompt_attention_mask=mask(), guidance_scale=1.0)
    return LuminaPipeline(transformer, flow(), kl(*SDXL), None, None), text


def chroma():
    transformer = ChromaTransformer2DModel(
        in_channels=64, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **TINY, **AXES
    )
    text = dict(prompt_embeds=embeds(32), prompt_attention_mask=mask().bool(), guidance_scale=1.0)
    return ChromaPipeline(flow(**DYNAMIC), kl(*FLUX), None, None, transformer), text


def chroma_image():
    pipe, text = chroma()
    parts = (pipe.scheduler, pipe.vae, None, None, pipe.transformer)
    return ChromaImg2ImgPipeline(*parts), text | dict(image=PICTURE, strength=1.0)


def ovis():
    transformer = OvisImageTransformer2DModel(in_channels=64, **TINY, **AXES)
    text = dict(prompt_embeds=embeds(32), guidance_scale=1.0)
    return OvisImagePipeline(flow(**DYNAMIC), kl(*FLUX), None, None, transformer), text


def longcat():
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, pooled_projection_dim=16, **TINY | dict(joint_attention_dim=16), **AXES
    )
    text = dict(prompt="a cat", guidance_scale=1.0, enable_prompt_rewrite=False)
    parts = qwen_image().components
    return LongCatImagePipeline(
        flow(**DYNAMIC), kl(*FLUX), parts["text_encoder"], parts["tokenizer"], None, transformer
    ), text


def bria():
    transformer = BriaTransformer2DModel(in_channels=64, **TINY, **AXES)
    text = dict(prompt_embeds=embeds(32), guidance_scale=1.0)
    return BriaPipeline(transformer, flow(**DYNAMIC), kl(*FLUX), None, None), text


def nucleus():
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), moe_enabled=False,
        capacity_factors=[8.0],
    )  # fmt: skip
    pipe = NucleusMoEImagePipeline(transformer, flow(**DYNAMIC), kl_qwen(), None, None)
    return pipe, dict(QWEN_TEXT, guidance_scale=1.0)


def krea2():
    transformer = Krea2Transformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    pipe = Krea2Pipeline(
        flow(**DYNAMIC), kl_qwen(), None, None, transformer, text_encoder_select_layers=(0, 1), is_distilled=False
    )
    text = torch.randn(1, 6, 2, 16, generator=torch.Generator().manual_seed(3))
    return pipe, dict(prompt_embeds=text, prompt_embeds_mask=mask().bool(), guidance_scale=0.0)


def kl_wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan():
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1,
        rope_max_seq_len=32,
    )  # fmt: skip
    pipe = WanPipeline(None, None, kl_wan(), flow(shift=7.0), transformer)
    return pipe, dict(prompt_embeds=embeds(32), num_frames=1, guidance_scale=1.0)


def joy_edit():
    transformer = JoyImageEditTransformer3DModel(
        hidden_size=32, num_attention_heads=2, text_dim=32, mlp_width_ratio=1.0, num_layers=1, rope_dim_list=[4, 4, 8]
    )
    pipe = JoyImageEditPipeline(flow(), kl_wan(), None, None, transformer, None)
    return pipe, dict(prompt_embeds=embeds(32), prompt_embeds_mask=mask(), image=PICTURE, guidance_scale=1.0)


def anima():
    """A modular pipeline."""
    transformer = CosmosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4,
        max_size=(4, 32, 32), rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=False, extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = AnimaTextConditioner(
        source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2, target_vocab_size=40
    )
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(
        vae=kl_qwen(), transformer=transformer, scheduler=flow(shift=3.0), text_conditioner=conditioner,
        text_encoder=qwen3().model, tokenizer=tokenizer(512), t5_tokenizer=tokenizer(512),
    )  # fmt: skip
    return pipe, dict(prompt="a red cat")


# The same networks in other pipelines


def like(kind, pipe, **more):
    """A pipeline or network of another class, with what this one has and `more`, as far as it takes them."""
    parts = pipe.components | {"add_watermarker": False} if hasattr(pipe, "components") else pipe.config
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in (dict(parts) | more).items() if name in taken})


CAT = dict(prompt="a cat")
FROM = dict(image=PICTURE, strength=1.0)
CONTROL = dict(control_image=PICTURE)
CONTROL_MASKED = CONTROL | dict(control_mask=MASKED["mask_image"])


def of(kind, make, /, given=None, parts=None):
    """Like the pipeline that `make` makes; `given` are arguments of its call in place of that one's."""

    def made():
        made = make()
        pipe, own = made if isinstance(made, tuple) else (made, CAT)
        return like(kind, pipe, **parts or {}), own if given is None else given

    return made


def modular(blocks, make, **given):
    def made():
        own = make().components
        pipe = blocks().init_pipeline()
        pipe.update_components(**{name: own[name] for name in pipe._component_specs if own.get(name) is not None})
        return pipe, CAT | given

    return made


def z_image_controlnet(kind, channels: int, **given):
    def made():
        pipe = z_image()
        net = ZImageControlNetModel(
            control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels, dim=32,
            n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        )  # fmt: skip
        return like(kind, pipe, controlnet=ZImageControlNetModel.from_transformer(net, pipe.transformer)), CAT | given

    return made


def sdxl_union(kind, **given):
    def made():
        pipe = sdxl()
        small = dict(num_trans_channel=8, num_trans_head=2, num_proj_channel=8)
        net = like(ControlNetUnionModel, pipe.unet, conditioning_embedding_out_channels=(8,) * 4, **small)
        return like(kind, pipe, controlnet=net), CAT | given | dict(control_image=[PICTURE], control_mode=[0])

    return made


def sdxl_controlnet_xs():
    pipe = sdxl()
    unet = like(UNet2DConditionModel, pipe.unet, layers_per_block=2)
    net = ControlNetXSAdapter.from_unet(unet, size_ratio=1.0, conditioning_embedding_out_channels=(8,) * 4)
    return like(StableDiffusionXLControlNetXSPipeline, pipe, unet=unet, controlnet=net), CAT | dict(image=PICTURE)


def sdxl_pix2pix():
    pipe = sdxl()
    unet = like(UNet2DConditionModel, pipe.unet, in_channels=8)
    return like(StableDiffusionXLInstructPix2PixPipeline, pipe, unet=unet), CAT | dict(image=PICTURE)


def sdxl_adapter():
    adapter = T2IAdapter(3, [8, 16], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl")
    return like(StableDiffusionXLAdapterPipeline, sdxl(), adapter=adapter), CAT | dict(image=PICTURE)


def sd3_controlnet_inpaint():
    pipe = sd3_controlnet()[0]
    net = like(SD3ControlNetModel, pipe.controlnet, extra_conditioning_channels=1)
    return like(StableDiffusion3ControlNetInpaintingPipeline, pipe, controlnet=net), CAT | CONTROL_MASKED


def kolors_image():
    pipe, text = kolors()
    pipe = like(KolorsImg2ImgPipeline, pipe)
    # Its call loses the pooled embeddings that it is given.
    kinds = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    pipe.encode_prompt = lambda *args, **kwargs: [text[kind] for kind in kinds]
    return pipe, CAT | FROM


def hunyuan_controlnet():
    pipe, text = hunyuan_dit()
    net = like(HunyuanDiT2DControlNetModel, pipe.transformer, transformer_num_layers=2)
    return like(HunyuanDiTControlNetPipeline, pipe, controlnet=net), text | CONTROL


def small(kind, *size) -> None:
    """An editing pipeline that makes every image of a million pixels makes one of this size."""
    sys.modules[kind.__module__].calculate_dimensions = lambda area, ratio: size


def longcat_edit():
    pipe = longcat()[0]
    processor = torch.nn.Identity()
    processor.image_processor = None
    pipe = like(LongCatImageEditPipeline, pipe, text_processor=processor)
    pipe.register_modules(text_processor=None)
    pipe._encode_prompt = lambda *args: embeds(16)  # its call cannot take embeddings
    small(LongCatImageEditPipeline, 64, 32)
    return pipe, CAT | dict(image=PICTURE, guidance_scale=1.0)


def qwen_edit_inpaint():
    small(QwenImageEditInpaintPipeline, 64, 32, None)
    return of_qwen(QwenImageEditInpaintPipeline, processor=None), QWEN_TEXT | MASKED


def qwen_controlnet_inpaint():
    pipe = qwen_controlnet()[0]
    net = like(QwenImageControlNetModel, pipe.controlnet, extra_condition_channels=4)
    return like(QwenImageControlNetInpaintPipeline, pipe, controlnet=net), QWEN_TEXT | CONTROL_MASKED


def joy_edit_plus():
    pipe = joy_edit()[0]
    pipe = like(JoyImageEditPlusPipeline, pipe, transformer=like(JoyImageEditPlusTransformer3DModel, pipe.transformer))
    pipe.encode_prompt_multiple_images = lambda **kwargs: (embeds(32), mask())  # its call cannot take embeddings
    pipe.image_processor.get_default_height_width = lambda picture, *_: (picture.height, picture.width)
    return pipe, CAT | dict(images=[[PICTURE, PICTURE]], guidance_scale=1.0)


def flux3():
    """A modular pipeline."""
    blocks = Flux3AutoBlocks()
    for name in "prompt_upsampler", "text_encoder":
        blocks.sub_blocks.pop(name)
    transformer = Flux3Transformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    pipe = blocks.init_pipeline()
    pipe.update_components(vae=kl_flux2(), transformer=transformer, scheduler=flow(shift=6.93))
    return pipe, dict(prompt_embeds=embeds(32), negative_prompt_embeds=embeds(32))


MID = dict(pag_applied_layers="mid")
FIRST = dict(pag_applied_layers="blocks.0")

OTHERS = {
    "Flux Kontext": (flux_kontext, "flux"),
    "Flux Kontext inpainting": (flux_kontext_inpaint, "flux"),
    "Flux Fill": (flux_fill, "flux"),
    "Flux Control": (flux_control, "flux"),
    "Flux ControlNet": (flux_controlnet, "flux"),
    "Flux Control image to image": (of(FluxControlImg2ImgPipeline, flux_control, FLUX_TEXT | FROM | CONTROL), "flux"),
    "Flux Control inpainting": (of(FluxControlInpaintPipeline, flux_control, FLUX_TEXT | MASKED | CONTROL), "flux"),
    "Flux ControlNet image to image": (
        of(FluxControlNetImg2ImgPipeline, flux_controlnet, FLUX_TEXT | FROM | CONTROL),
        "flux",
    ),
    "Flux ControlNet inpainting": (
        of(FluxControlNetInpaintPipeline, flux_controlnet, FLUX_TEXT | MASKED | CONTROL),
        "flux",
    ),
    "Flux, modular": (modular(FluxAutoBlocks, flux), "flux"),
    "Flux image to image": (flux_image, "flux"),
    "Flux inpainting": (flux_inpaint, "flux"),
    "Z-Image image to image": (z_image_from_image, "flux"),
    "Z-Image inpainting": (z_image_inpaint, "flux"),
    "Z-Image ControlNet": (z_image_controlnet(ZImageControlNetPipeline, 16, **CONTROL), "flux"),
    "Z-Image ControlNet inpainting": (
        z_image_controlnet(
            ZImageControlNetInpaintPipeline, 33, image=PICTURE, mask_image=MASKED["mask_image"], **CONTROL
        ),
        "flux",
    ),
    "Z-Image Omni": (of(ZImageOmniPipeline, z_image, parts=dict(siglip=None, siglip_processor=None)), "flux"),
    "Z-Image, modular": (modular(ZImageAutoBlocks, z_image), "flux"),
    "Chroma": (chroma, "flux"),
    "Chroma image to image": (chroma_image, "flux"),
    "Ovis-Image": (ovis, "flux"),
    "LongCat-Image": (longcat, "flux"),
    "LongCat-Image-Edit": (longcat_edit, "flux"),
    "Bria": (bria, "flux"),
    "Lumina2": (lumina2, "flux"),
    "HiDream": (hidream, "flux"),
    "Kandinsky 5": (kandinsky5, "flux"),
    "Kandinsky 5 image to image": (kandinsky5_image, "flux"),
    "PRX": (prx, "flux"),
    "SD3 ControlNet": (sd3_controlnet, "sd3"),
    "SD3 image to image": (sd3_image, "sd3"),
    "SD3 inpainting": (sd3_inpaint, "sd3"),
    "SD3 ControlNet inpainting": (sd3_controlnet_inpaint, "sd3"),
    "SD3 PAG": (of(StableDiffusion3PAGPipeline, sd3, parts=FIRST), "sd3"),
    "SD3 PAG image to image": (of(StableDiffusion3PAGImg2ImgPipeline, sd3, CAT | FROM, FIRST), "sd3"),
    "SD3, modular": (modular(StableDiffusion3AutoBlocks, sd3), "sd3"),
    "SDXL inpainting": (sdxl_inpaint, "sdxl"),
    "SDXL ControlNet": (sdxl_controlnet, "sdxl"),
    "SDXL ControlNet image to image": (
        of(StableDiffusionXLControlNetImg2ImgPipeline, sdxl_controlnet, CAT | FROM | CONTROL),
        "sdxl",
    ),
    "SDXL ControlNet inpainting": (
        of(StableDiffusionXLControlNetInpaintPipeline, sdxl_controlnet, CAT | MASKED | CONTROL),
        "sdxl",
    ),
    "SDXL ControlNet Union": (sdxl_union(StableDiffusionXLControlNetUnionPipeline), "sdxl"),
    "SDXL ControlNet Union image to image": (
        sdxl_union(StableDiffusionXLControlNetUnionImg2ImgPipeline, **FROM),
        "sdxl",
    ),
    "SDXL ControlNet Union inpainting": (sdxl_union(StableDiffusionXLControlNetUnionInpaintPipeline, **MASKED), "sdxl"),
    "SDXL ControlNet-XS": (sdxl_controlnet_xs, "sdxl"),
    "SDXL InstructPix2Pix": (sdxl_pix2pix, "sdxl"),
    "SDXL T2I-Adapter": (sdxl_adapter, "sdxl"),
    "SDXL PAG": (of(StableDiffusionXLPAGPipeline, sdxl, parts=MID), "sdxl"),
    "SDXL PAG image to image": (of(StableDiffusionXLPAGImg2ImgPipeline, sdxl, CAT | FROM, MID), "sdxl"),
    "SDXL PAG inpainting": (of(StableDiffusionXLPAGInpaintPipeline, sdxl, CAT | MASKED, MID), "sdxl"),
    "SDXL PAG ControlNet": (of(StableDiffusionXLControlNetPAGPipeline, sdxl_controlnet, parts=MID), "sdxl"),
    "SDXL PAG ControlNet image to image": (
        of(StableDiffusionXLControlNetPAGImg2ImgPipeline, sdxl_controlnet, CAT | FROM | CONTROL, MID),
        "sdxl",
    ),
    "SDXL, modular": (modular(StableDiffusionXLAutoBlocks, sdxl), "sdxl"),
    "Kolors": (kolors, "sdxl"),
    "Kolors image to image": (kolors_image, "sdxl"),
    "Kolors PAG": (of(KolorsPAGPipeline, kolors, parts=MID), "sdxl"),
    "PixArt-Sigma": (pixart_sigma, "sdxl"),
    "PixArt-Sigma PAG": (of(PixArtSigmaPAGPipeline, pixart_sigma, parts=FIRST), "sdxl"),
    "HunyuanDiT": (hunyuan_dit, "sdxl"),
    "HunyuanDiT PAG": (of(HunyuanDiTPAGPipeline, hunyuan_dit, parts=dict(pag_applied_layers="blocks.1")), "sdxl"),
    "HunyuanDiT ControlNet": (hunyuan_controlnet, "sdxl"),
    "AuraFlow": (aura_flow, "sdxl"),
    "OmniGen": (omnigen, "sdxl"),
    "Lumina": (lumina, "sdxl"),
    "FLUX.2-klein KV": (klein_kv, "flux2"),
    "FLUX.2-klein inpainting": (klein_inpaint, "flux2"),
    "FLUX.2-klein, modular": (modular(Flux2KleinAutoBlocks, klein, text_encoder_out_layers=(1, 2, 3)), "flux2"),
    "FLUX.3": (flux3, "flux2"),
    "ERNIE-Image": (ernie, "flux2"),
    "Bria FIBO 2": (bria_fibo2, "flux2"),
    "QwenImage-Edit": (qwen_edit, "qwenimage"),
    "QwenImage-Edit-Plus": (qwen_edit_plus, "qwenimage"),
    "QwenImage image to image": (qwen_image_to_image, "qwenimage"),
    "QwenImage inpainting": (qwen_inpaint, "qwenimage"),
    "QwenImage ControlNet": (qwen_controlnet, "qwenimage"),
    "QwenImage ControlNet inpainting": (qwen_controlnet_inpaint, "qwenimage"),
    "QwenImage-Edit inpainting": (qwen_edit_inpaint, "qwenimage"),
    "QwenImage, modular": (modular(QwenImageAutoBlocks, qwen_image), "qwenimage"),
    "NucleusMoE-Image": (nucleus, "qwenimage"),
    "Krea 2": (krea2, "qwenimage"),
    "Anima": (anima, "qwenimage"),
    "Wan, one frame": (wan, "qwenimage"),
    "JoyImage-Edit": (joy_edit, "qwenimage"),
    "JoyImage-Edit-Plus": (joy_edit_plus, "qwenimage"),
}


def build_other(name: str):
    """The pipeline, arguments for its call, and its latent space."""
    torch.manual_seed(0)
    pipe, kwargs = OTHERS[name][0]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():  # some are left as memory has them, others zero, which would hide much
                empty = parameter.ndim > 1 and not parameter.any()
                if parameter.numel() and (empty or not parameter.abs().max() < 1e3):
                    parameter.data = torch.randn(parameter.shape) / math.sqrt(max(parameter.shape))
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, SIZE | kwargs, OTHERS[name][1]
