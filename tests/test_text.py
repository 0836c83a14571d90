"""Prompt encoding with a tiny Gemma-2 and a tokenizer made here."""

import hashlib
import shutil

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.utils import logging
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from conftest import TINY, tiny_model
from families import save_gemma
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.cli.options import Text
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


def test_the_tokenizer_is_asked_once_and_left_as_it_was(gemma):
    tokenizer, encoder = gemma
    asked = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **kwargs):
            asked.append(len(texts))
            return tokenizer(texts, **kwargs)

    encode_prompts(["a red cat", "a dog"], Counting(), encoder)
    assert asked == [3] and tokenizer.padding_side == "left"  # the instruction and two prompts


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
    negative = dict(prompt_embeds=embeds, guidance_scale=3.0)
    pipeline.register_to_config(default_negative_prompt="a red dog")
    standing = encode_prompts(["a red dog"], tokenizer, encoder)
    torch.testing.assert_close(decode(**negative), decode(**negative, negative_prompt_embeds=standing))
    torch.testing.assert_close(decode(**negative, negative_prompt=""), decode(**negative, negative_prompt_embeds=empty))
    found = pipeline.encode_prompt(["a red cat", "a dog"])
    torch.testing.assert_close(found[0], embeds)
    assert found[1] is None  # not guided by default
    torch.testing.assert_close(pipeline.encode_prompt("a dog", do_classifier_free_guidance=True)[1], standing)
    torch.testing.assert_close(pipeline.encode_prompt("a dog", "", True)[1], empty)
    pipeline.register_to_config(default_guidance_scale=2.0)
    torch.testing.assert_close(pipeline.encode_prompt("a dog", "")[1], empty)
    assert pipeline.encode_prompt("a dog", "", False)[1] is None
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
    with pytest.raises(ValueError, match="gemma: no such folder or file"):
        PromptEncoder(str(folder), cache=cache)(["a cat"])
    with pytest.raises(ValueError, match="no such folder or file"):  # encoded otherwise is another content
        PromptEncoder(str(folder), quantization="8bit", cache=cache)(["a dog"])


def test_captions_are_encoded_together_and_once(tmp_path, monkeypatch):
    """As a training's batches come: 8 at a time, none twice, the last ones kept; the numbers of each alone."""
    monkeypatch.setattr("pixeldecoder.text.KEPT", 12)
    save_gemma(tmp_path)
    encoder, sizes = PromptEncoder(str(tmp_path)), []
    encoder(["warm up"])
    encoder._parts[1].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    captions = [f"cat {'a ' * i}" for i in range(10)]
    embeds = encoder([*captions, captions[3]])
    assert sizes == [8, 2] and torch.equal(embeds[3], embeds[10])
    again = encoder([captions[5], "dog", captions[5]])
    assert sizes == [8, 2, 1] and torch.equal(again[0], embeds[5]) and torch.equal(again[2], embeds[5])
    for caption, one in zip(captions, embeds, strict=False):
        torch.testing.assert_close(PromptEncoder(str(tmp_path))([caption])[0], one)
    sizes.clear()
    encoder(captions[:1])
    encoder(["new", "newer"])  # what was not asked for longest is given up: "warm up" and the second caption
    encoder([captions[0], *captions[2:]])
    assert sizes == [2]
    encoder(captions[1:2])
    assert sizes == [2, 1]
    kept = [known for known in encoder._seen.values()]
    assert len(kept) == 12 and all(known.untyped_storage().nbytes() == known.nbytes for known in kept)


def test_what_will_be_fetched_is_said_before(tmp_path, monkeypatch, caplog):
    """By name from the Hub, unless it is in its cache; not for a folder."""
    save_gemma(tmp_path / "gemma")
    load, order = AutoTokenizer.from_pretrained, []

    def from_hub(name, **kwargs):
        order.append([record.name for record in caplog.records].count("pixeldecoder.text"))
        return load(tmp_path / "gemma")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(tmp_path))
    monkeypatch.setattr("pixeldecoder.text.AutoTokenizer.from_pretrained", from_hub)
    monkeypatch.setattr(
        "pixeldecoder.text.AutoModel.from_pretrained",
        lambda name, **kw: Gemma2Model.from_pretrained(tmp_path / "gemma"),
    )
    logging.enable_propagation()
    try:
        for name, cached in (("somebody/gemma", None), ("somebody/gemma", "config.json"), (str(tmp_path), None)):
            monkeypatch.setattr("pixeldecoder.text.try_to_load_from_cache", lambda name, file, cached=cached: cached)
            PromptEncoder(name)(["a"])
    finally:
        logging.disable_propagation()
    assert order == [1, 1, 1]
    assert "fetching the text encoder somebody/gemma from https://huggingface.co, about 5 GB" in caplog.text


def test_command_gives_a_guided_decoder_its_negative_prompt(tmp_path):
    """Encoded before it runs, with the prompt or beside a file of embeddings."""
    save_gemma(tmp_path / "gemma")
    pipeline = PixelDecoderPipeline(
        tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0), default_guidance_scale=3.0, default_negative_prompt="dog"
    )
    given = dict(text_encoder=str(tmp_path / "gemma"), text_device="cpu")
    saved = tmp_path / "p.safetensors"
    found = Text(prompt="a cat", save_prompt_embeds=saved, **given).text_kwargs(pipeline)
    known = PromptEncoder(str(tmp_path / "gemma"))
    expected = {"prompt_embeds": known(["a cat"]), "negative_prompt_embeds": known(["dog"])}
    torch.testing.assert_close(found, expected)
    assert pipeline.prompt_encoder._parts is None
    torch.testing.assert_close(Text(prompt_embeds=saved, **given).text_kwargs(pipeline), expected)
    pipeline.register_to_config(default_guidance_scale=1.0)
    assert Text(prompt_embeds=saved, **given).text_kwargs(pipeline).get("negative_prompt_embeds") is None
    assert Text(prompt="a cat", **given).text_kwargs(pipeline)["negative_prompt_embeds"] is None


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
    assert torch.equal(held := load_prompt_embeds(tmp_path / "p.safetensors"), embeds)
    (tmp_path / "p.safetensors").open("r+b").write(bytes(12_000))
    assert torch.equal(held, embeds)  # no longer its file, which may change
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
