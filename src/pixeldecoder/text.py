"""Captions in, prompt embeddings (B, 300, 2304) out (method: Prompts)."""

import hashlib
import inspect
import os
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

TEXT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"
"""The ungated copy of google/gemma-2-2b-it, whose last hidden state the released networks read."""
MAX_TOKENS = 300


def instruction() -> str:
    """What precedes every caption: diffusers' default for Sana, one pair of quotes changed."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines).replace("'Enhanced prompt'", '"Enhanced prompt"', 1)


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel
) -> torch.Tensor:
    """Last hidden states (B, 300, Dt) of instruction + caption: those of the start token and of the last 299 tokens.

    A longer caption is cut, with a warning that says what was lost.
    """
    prefix = instruction()
    length = len(tokenizer(prefix).input_ids) + MAX_TOKENS - 2
    for prompt in prompts:
        lost = tokenizer(prefix + prompt).input_ids[length:]
        if lost:
            logger.warning(
                f"the prompt is {len(lost)} tokens longer than the {MAX_TOKENS - 2} that the decoder reads; this was "
                f"cut: {tokenizer.decode(lost)!r}"
            )
    # Set here, not where the tokenizer is made: Gemma's default is left, and the selection below counts on right.
    tokenizer.padding_side = "right"
    tokens = tokenizer(
        [prefix + prompt for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    hidden = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return torch.cat([hidden[:, :1], hidden[:, 1 - MAX_TOKENS :]], dim=1)


class PromptEncoder:
    """A frozen text encoder that is loaded when a caption comes that it has not seen: captions in, embeddings out.

    Args:
        name: folder or Hub id of Gemma-2 with its tokenizer.
        device: where it runs, "cpu" too beside a decoder on a GPU; `None`: where the decoder does.
        quantization: of its weights, by bitsandbytes (`pip install "pixeldecoder[quantize]"`).
        cache: folder in which embeddings are kept, each in a file named after its content (see `prompt_cache`); `None`
            keeps them in memory alone.
    """

    def __init__(
        self,
        name: str = TEXT_ENCODER,
        device: torch.device | str | None = None,
        quantization: Literal["8bit", "4bit"] | None = None,
        cache: Path | None = None,
    ):
        self.name, self.quantization, self.cache = name, quantization, cache
        self.device = None if device is None else torch.device(device)
        self._parts: tuple[PreTrainedTokenizerBase, PreTrainedModel] | None = None
        self._seen: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: list[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """(B, 300, Dt); `device` is that of an encoder that was made without one."""
        device = self.device or torch.device(device)
        return torch.cat([self._one(prompt, device) for prompt in prompts]).to(device)

    def unload(self) -> None:
        """Free the model's memory; what was encoded stays known."""
        self._parts = None

    def _one(self, prompt: str, device: torch.device) -> torch.Tensor:
        key = hashlib.sha256("\0".join([self.name, str(self.quantization), instruction(), prompt]).encode()).hexdigest()
        if key in self._seen:
            return self._seen[key]
        path = self.cache / f"{key}.safetensors" if self.cache is not None else None
        if path is not None and path.is_file():
            embeds = load_prompt_embeds(path)
        else:
            embeds = encode_prompts([prompt], *self._load(device)).cpu()
            if path is not None:
                save_prompt_embeds(embeds, path, prompt)
        if prompt == "" or self.cache is not None:  # training's captions are too many to keep
            self._seen[key] = embeds
        return embeds

    def _load(self, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        if self._parts is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            kwargs = {}
            if self.quantization is not None:
                from transformers import BitsAndBytesConfig
                from transformers.utils import is_bitsandbytes_available

                if not is_bitsandbytes_available():
                    raise ValueError(
                        'a quantised text encoder needs bitsandbytes: pip install "pixeldecoder[quantize]"'
                    )
                bits = {"8bit": dict(load_in_8bit=True), "4bit": dict(load_in_4bit=True)}[self.quantization]
                kwargs = dict(quantization_config=BitsAndBytesConfig(**bits), device_map={"": device})
            from pixeldecoder.latents import unreachable

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.name)
                model = AutoModel.from_pretrained(self.name, dtype=dtype, **kwargs)
            except OSError as error:
                raise unreachable(self.name, error) from None
            model = model if self.quantization else model.to(device)
            self._parts = tokenizer, model.eval().requires_grad_(False)
        return self._parts


def cache_folder() -> Path:
    """$PIXELDECODER_CACHE, or pixeldecoder in the user's cache folder."""
    base = os.environ.get("PIXELDECODER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "pixeldecoder"
    return Path(base).expanduser()


def prompt_cache() -> Path:
    """Where the command keeps prompt embeddings."""
    return cache_folder() / "prompts"


def save_prompt_embeds(embeds: torch.Tensor, path: Path, prompt: str = "") -> None:
    """Prompt embeddings (B, T, Dt) to a .safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"prompt_embeds": embeds.contiguous()}, temporary, metadata={"prompt": prompt})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_prompt_embeds(path: Path) -> torch.Tensor:
    """Prompt embeddings (B, T, Dt) that `save_prompt_embeds` wrote.

    Raises:
        ValueError: no such file, or another.
    """
    try:
        return load_file(path)["prompt_embeds"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f'{path}: expected a .safetensors file with "prompt_embeds" ({error})') from None
