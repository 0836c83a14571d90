"""Captions in, prompt embeddings (B, 300, 2304) out (method: Prompts)."""

import inspect

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
    """Last hidden states (B, 300, Dt) of instruction + caption: those of the start token and of the last 299 tokens."""
    prefix = instruction()
    length = len(tokenizer(prefix).input_ids) + MAX_TOKENS - 2
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
    """A frozen text encoder by its name: captions in, embeddings out; the empty caption's are computed once.

    Args:
        name: folder or Hub id of Gemma-2 with its tokenizer.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, dtype=dtype).to(device).eval().requires_grad_(False)
        self.empty = encode_prompts([""], self.tokenizer, self.model)

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """(B, 300, Dt)."""
        return torch.cat([encode_prompts([p], self.tokenizer, self.model) if p else self.empty for p in prompts])
