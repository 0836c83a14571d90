"""Captions in, prompt embeddings (B, 300, 2304) out."""

import hashlib
import inspect
import os
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils import logging
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pixeldecoder.errors import require
from pixeldecoder.files import write_whole
from pixeldecoder.hub import download, hub_id, unreachable
from pixeldecoder.presets import TEXT_ENCODER

logger = logging.get_logger(__name__)

MAX_TOKENS = 300
BATCH = 8
"""Captions that the text encoder reads at a time."""
KEPT = 256
"""Captions whose embeddings stay in memory, the last ones asked for: 0.35 GB of Gemma-2's in bfloat16."""


def instruction() -> str:
    """What precedes every caption: diffusers' default for Sana, one pair of quotes changed."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines).replace("'Enhanced prompt'", '"Enhanced prompt"', 1)


@torch.no_grad()
def encode_prompts(
    prompts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Last hidden states (B, 300, Dt) of instruction + caption: those of the start token and of the last 299 tokens.

    A longer caption is cut, with a warning that says what was lost.

    Args:
        device: where the text encoder computes, if that is not where its weights are now.
    """
    prefix = instruction()
    instruction_ids, *rows = tokenizer([prefix, *(prefix + prompt for prompt in prompts)]).input_ids
    length = len(instruction_ids) + MAX_TOKENS - 2
    # Padded here, on the right: Gemma's tokenizer pads on the left, and is the caller's.
    ids = torch.full((len(rows), length), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, given in enumerate(rows):
        if lost := given[length:]:
            logger.warning(
                f"the prompt is {len(lost)} tokens longer than the {MAX_TOKENS - 2} that the decoder reads; this was "
                f"cut: {tokenizer.decode(lost)!r}"
            )
        kept = torch.tensor(given[:length])
        ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
    device = device or text_encoder.device
    embeds = []
    for tokens, attended in zip(ids.to(device).split(BATCH), mask.to(device).split(BATCH), strict=True):
        hidden = text_encoder(input_ids=tokens, attention_mask=attended).last_hidden_state
        embeds.append(torch.cat([hidden[:, :1], hidden[:, 1 - MAX_TOKENS :]], dim=1))
    return torch.cat(embeds)


class PromptEncoder:
    """Captions in, embeddings out, by a frozen text encoder that is loaded when the first new caption comes.

    Args:
        name: folder or Hub id of Gemma-2 with its tokenizer.
        device: where it runs; "cpu" saves a GPU's memory; `None`: where the decoder does.
        quantization: of its weights, by bitsandbytes (`pip install "pixeldecoder[quantize]"`).
        cache: folder in which embeddings are kept, too, each in a file named after its content.
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
        keys = {prompt: self._key(prompt) for prompt in prompts}
        known = {prompt: self._look_up(key, device) for prompt, key in keys.items()}
        embeds = {prompt: embed for prompt, embed in known.items() if embed is not None}
        if new := [prompt for prompt in keys if prompt not in embeds]:
            for prompt, embed in zip(new, encode_prompts(new, *self._load(device), device).split(1), strict=True):
                embeds[prompt] = embed.clone()  # a view would keep the whole batch in memory
                if self.cache is not None:
                    try:
                        save_prompt_embeds(embed.cpu(), self.cache / f"{keys[prompt]}.safetensors", prompt)
                    except (OSError, SafetensorError) as error:  # the next run encodes it anew
                        logger.warning(f"the encoded prompt is not kept: {error}")
                        self.cache = None
        for prompt, key in keys.items():
            self._seen.pop(key, None)
            self._seen[key] = embeds[prompt]
        for key in list(self._seen)[:-KEPT]:
            del self._seen[key]
        return torch.cat([embeds[prompt] for prompt in prompts])

    def unload(self) -> None:
        """Free the model's memory; embeddings are kept."""
        self._parts = None

    def _key(self, prompt: str) -> str:
        content = [self.name, str(self.quantization), instruction(), prompt]
        return hashlib.sha256("\0".join(content).encode()).hexdigest()

    def _look_up(self, key: str, device: torch.device) -> torch.Tensor | None:
        """Embeddings (1, 300, Dt) from memory or the folder."""
        if key in self._seen:
            return self._seen[key].to(device)
        path = self.cache / f"{key}.safetensors" if self.cache is not None else None
        if path is None or not path.is_file():
            return None
        try:
            return load_prompt_embeds(path).to(device)
        except ValueError as error:
            logger.warning(f"the prompt is encoded anew: {error}")
            return None

    def _load(self, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        if self._parts is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            kwargs = {}
            if self.quantization is not None:
                from transformers import BitsAndBytesConfig

                require("a quantised text encoder", "quantize", "bitsandbytes")
                bits = {"8bit": dict(load_in_8bit=True), "4bit": dict(load_in_4bit=True)}[self.quantization]
                kwargs = dict(quantization_config=BitsAndBytesConfig(**bits), device_map={"": device})
            name = os.path.expanduser(self.name)
            found = None if Path(name).is_dir() else hub_id(name)
            if found is not None and not try_to_load_from_cache(found, "config.json"):
                logger.warning(f"fetching the text encoder {name} from https://huggingface.co, about 5 GB")
            # The whole folder first: where the Hub cannot be reached, transformers would ask five times for each file.
            folder = name if Path(name).is_dir() else download(name, ["*.json", "*.safetensors", "tokenizer*"])
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
                model = AutoModel.from_pretrained(folder, dtype=dtype, **kwargs)
            except OSError as error:
                raise unreachable(self.name, error) from None
            model = model if self.quantization else model.to(device)
            self._parts = tokenizer, model.eval().requires_grad_(False)
        return self._parts


def save_prompt_embeds(embeds: torch.Tensor, path: Path, prompt: str = "") -> None:
    """Prompt embeddings (B, T, Dt) to a .safetensors file, whole or not at all."""
    tensors = {"prompt_embeds": embeds.contiguous()}
    write_whole(path, lambda file: save_file(tensors, file, metadata={"prompt": prompt}))


def load_prompt_embeds(path: Path) -> torch.Tensor:
    """Prompt embeddings (B, T, Dt) that `save_prompt_embeds` wrote.

    Raises:
        ValueError: no such file, or another.
    """
    try:
        embeds = load_file(path)["prompt_embeds"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f'{path}: expected a .safetensors file with "prompt_embeds" ({error})') from None
    if embeds.ndim != 3 or 0 in embeds.shape or not embeds.is_floating_point():
        raise ValueError(f"{path}: expected prompt embeddings (B, T, Dt), got {embeds.dtype} {tuple(embeds.shape)}")
    return embeds.clone()  # no longer the file, which may change
