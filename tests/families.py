"""Every latent diffusion pipeline that the tests run: diffusers' own classes on tiny random components; SqueezeNet."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer(length: int = 77) -> PreTrainedTokenizerFast:
    """A word is one of 40 tokens, by its letters' sum: no vocabulary is needed."""
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "cat", "dog"])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=length, padding_side="right", chat_template=CHAT, **special
    )


def kl(channels: int, scaling_factor: float, shift_factor: float | None) -> AutoencoderKL:
    """With the family's normalisation and 8 px to a latent cell."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=channels,
        scaling_factor=scaling_factor, shift_factor=shift_factor, sample_size=128,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def kl_flux2() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=32,
    ).eval()  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def kl_qwen() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def clip(projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=32, max_position_embeddings=77, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8,
        )
    ).eval()  # fmt: skip


def flow(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**kwargs)


def save_gemma(folder, width: int = 20) -> None:
    """A tiny Gemma-2 with its tokenizer."""
    config = Gemma2Config(
        vocab_size=40, hidden_size=width, intermediate_size=max(32, width), num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8 if width < 64 else 32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2Model(config).save_pretrained(folder)
    tokenizer(8192).save_pretrained(folder)


DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = kl(16, 0.3611, 0.1159)
    return FluxPipeline(flow(**DYNAMIC), vae, clip(), tokenizer(), t5(), tokenizer(), transformer)


def flux2_transformer(guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def flux2() -> Flux2Pipeline:
    # Its 24 B vision-language model is left out: prompts come embedded.
    return Flux2Pipeline(flow(**DYNAMIC), kl_flux2(), None, None, flux2_transformer(True))


def klein() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        flow(**DYNAMIC), kl_flux2(), qwen3(), tokenizer(512), flux2_transformer(False), is_distilled=True
    )


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    # Its T5 is left out, which the pipeline allows, and pads CLIP's width with zeros.
    return StableDiffusion3Pipeline(
        transformer, flow(shift=3.0), kl(16, 1.5305, 0.0609), clip(True), tokenizer(), clip(True), tokenizer(), None,
        None,
    )  # fmt: skip


def sdxl(scheduler=None) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), cross_attention_dim=64, norm_num_groups=4,
        projection_class_embeddings_input_dim=8 * 6 + 32,
    )  # fmt: skip
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = scheduler or EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(
        kl(4, 0.13025, None), clip(), clip(True), tokenizer(), tokenizer(), unet, scheduler, add_watermarker=False
    )


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    for parameter in transformer.parameters():  # its padding tokens are left uninitialised
        parameter.data = torch.randn(parameter.shape) * 0.1
    return ZImagePipeline(flow(shift=3.0), kl(16, 0.3611, 0.1159), qwen3(), tokenizer(512), transformer)


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6),
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=14,
        ),
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    return QwenImagePipeline(flow(**DYNAMIC), kl_qwen(), encoder, tokenizer(1024), transformer)


FAMILIES = {
    "FLUX.1": (flux, "flux"),
    "FLUX.2": (flux2, "flux2"),
    "FLUX.2-klein": (klein, "flux2"),
    "SD3": (sd3, "sd3"),
    "SDXL": (sdxl, "sdxl"),
    "Z-Image": (z_image, "flux"),
    "Qwen-Image": (qwen_image, "qwenimage"),
}
SIZE = dict(height=32, width=64)


def build(name: str):
    """The pipeline, and arguments for its call beside the prompt."""
    torch.manual_seed(0)
    pipe = FAMILIES[name][0]()
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(SIZE)
    if name == "FLUX.2":
        kwargs["prompt_embeds"] = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(3))
    if name == "FLUX.2-klein":
        kwargs["text_encoder_out_layers"] = (1, 2, 3)
    return pipe, kwargs


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def pool():
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


class SqueezeNet(nn.Module):
    """torchvision's `squeezenet1_0`, without the classifier."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, stride=2), nn.ReLU(), pool(),
            Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), pool(),
            Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), pool(),
            Fire(512, 64, 256),
        )  # fmt: skip
