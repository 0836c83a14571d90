"""Prompt encoding with a tiny Gemma-2 and a tokenizer made here."""

import hashlib
import shutil

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.utils import logging
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from conftest import TINY, tiny_model
from families import save_gemma
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.text import PromptEncoder, encode_prompts, instruction, load_prompt_embeds, save_prompt_embeds


@pytest.fixture(scope="module")
def gemma():
    words = sorted({*["a", "photo", "of", "red", "cat", "dog"], *pre_tokenized(instruction())})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
    fast.padding_side = "left"  # Gemma's default, which must not matter
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(vocabulary), hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return fast, Gemma2Model(config).eval()


def pre_tokenized(text):
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]


def test_instruction():
    text = instruction()
    assert len(text) == 1057
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"


def test_tokens_that_are_kept(gemma):
    tokenizer, encoder = gemma
    words = [*pre_tokenized(instruction()), "a", "photo", "of", "a", "red", "cat"]
    n = 1 + len(pre_tokenized(instruction()))
    ids = [1, *tokenizer.convert_tokens_to_ids(words)]
    length = n + 298
    tokens = torch.tensor([ids + [0] * (length - len(ids))])
    mask = (torch.arange(length)[None] < len(ids)).long()
    hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    # 300 = the start token, and the last 299 of n + 298: the instruction's own last token comes first among them.
    expected = torch.cat([hidden[:, 0:1], hidden[:, n - 1 :]], dim=1)
    embeds = encode_prompts(["a photo of a red cat"], tokenizer, encoder)
    assert embeds.shape == (1, 300, 20)
    torch.testing.assert_close(embeds, expected)


def test_long_prompts_are_cut_and_batches_do_not_mix(gemma):
    tokenizer, encoder = gemma
    long = "red " * 400
    both = encode_prompts([long, "a dog"], tokenizer, encoder)
    assert both.shape == (2, 300, 20)
    torch.testing.assert_close(both[1:], encode_prompts(["a dog"], tokenizer, encoder))
    torch.testing.assert_close(both[:1], encode_prompts(["red " * 298], tokenizer, encoder))


def test_pipeline_encodes_prompts(gemma, tmp_path):
    tokenizer, encoder = gemma
    pipeline = PixelDecoderPipeline(
        tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0), text_encoder=encoder, tokenizer=tokenizer
    )
    pipeline.save_pretrained(tmp_path)
    pipeline = PixelDecoderPipeline.from_pretrained(tmp_path)
    latents = torch.randn(2, 16, 2, 2)

    def decode(**kwargs):
        return pipeline(latents, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images

    embeds = encode_prompts(["a red cat", "a dog"], tokenizer, encoder)
    torch.testing.assert_close(decode(prompt=["a red cat", "a dog"]), decode(prompt_embeds=embeds))
    guided = decode(prompt=["a red cat", "a dog"], guidance_scale=3.0)
    empty = encode_prompts([""], tokenizer, encoder)
    torch.testing.assert_close(guided, decode(prompt_embeds=embeds, negative_prompt_embeds=empty, guidance_scale=3.0))
    torch.testing.assert_close(decode(prompt="a dog"), decode(prompt=["a dog", "a dog"]))
    with pytest.raises(ValueError, match=r"\(1 or 2, T, 20\), got \(3,"):
        decode(prompt=["a", "b", "c"])


def test_cache_on_disk(tmp_path):
    """The second time, in another process so to say, the encoder is not needed; for another prompt it is."""
    folder, cache = tmp_path / "gemma", tmp_path / "cache"
    save_gemma(folder)
    embeds = PromptEncoder(str(folder), cache=cache)(["a red cat", "a dog"])
    assert embeds.shape == (2, 300, 20) and len(list(cache.glob("*.safetensors"))) == 2
    shutil.rmtree(folder)
    torch.testing.assert_close(PromptEncoder(str(folder), cache=cache)(["a dog", "a red cat"]), embeds.flip(0))
    with pytest.raises(ValueError, match=r"could not be loaded.*Without a network"):
        PromptEncoder(str(folder), cache=cache)(["a cat"])
    with pytest.raises(ValueError, match="could not be loaded"):  # encoded otherwise is another content
        PromptEncoder(str(folder), quantization="8bit", cache=cache)(["a dog"])


def test_encoder_is_loaded_late_and_freed(tmp_path):
    save_gemma(tmp_path)
    encoder = PromptEncoder(str(tmp_path))
    assert encoder._parts is None
    first = encoder(["a dog"])
    encoder.unload()
    assert encoder._parts is None
    assert torch.equal(encoder(["a dog"]), first)


@pytest.mark.parametrize(("quantization", "error", "share"), [("8bit", 0.05, 0.4), ("4bit", 0.5, 0.3)])
def test_quantised_encoder(tmp_path, quantization, error, share):
    save_gemma(tmp_path, width=64)
    full, quantised = PromptEncoder(str(tmp_path)), PromptEncoder(str(tmp_path), quantization=quantization)
    expected, found = full(["a red cat"]), quantised(["a red cat"])
    assert 0 < (found - expected).norm() / expected.norm() < error
    layers = [model._parts[1].layers.state_dict() for model in (full, quantised)]
    sizes = [sum(tensor.numel() * tensor.element_size() for tensor in state.values()) for state in layers]
    assert sizes[1] < share * sizes[0]


def test_a_long_prompt_warns(gemma, caplog):
    logging.enable_propagation()
    try:
        encode_prompts(["a red " * 149], *gemma)
        assert not caplog.records
        encode_prompts(["a red " * 149 + "cat dog"], *gemma)
    finally:
        logging.disable_propagation()
    assert "2 tokens longer than the 298" in caplog.text and "'cat dog'" in caplog.text


def test_saved_prompt_embeds(tmp_path):
    embeds = torch.randn(1, 300, 20).bfloat16()
    save_prompt_embeds(embeds, tmp_path / "p.safetensors", "a cat")
    assert torch.equal(load_prompt_embeds(tmp_path / "p.safetensors"), embeds)
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    for name in ("none", "broken"):
        with pytest.raises(ValueError, match=r'expected a \.safetensors file with "prompt_embeds"'):
            load_prompt_embeds(tmp_path / f"{name}.safetensors")


def test_decoder_encodes_prompts_without_a_text_encoder_of_its_own(tmp_path):
    save_gemma(tmp_path)
    pipeline = PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0))
    pipeline.prompt_encoder = PromptEncoder(str(tmp_path))
    latents = torch.randn(1, 16, 2, 2)
    kwargs = dict(generator=torch.Generator().manual_seed(0), output_type="pt")
    image = pipeline(latents, "a dog", **kwargs).images
    kwargs["generator"].manual_seed(0)
    embeds = PromptEncoder(str(tmp_path))(["a dog"])
    torch.testing.assert_close(image, pipeline(latents, prompt_embeds=embeds, **kwargs).images)
