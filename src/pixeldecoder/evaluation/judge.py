"""An evaluation's images in, which of two methods a vision model prefers out."""

import base64
import io
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixeldecoder.evaluation.methods import Setting
from pixeldecoder.evaluation.run import append_line, image_path, read_lines, read_rows
from pixeldecoder.files import load_image

QUESTION = (
    "Here are two versions of one picture{prompt}. Which one looks better to you: sharper where it should be, with "
    "natural detail, colours and textures, and without artefacts? Answer with one word alone: first, second, or tie."
)
SHOWN = 1024
"""Side in pixels of the centre crops that are shown, so that the model does not shrink the detail away."""


def judge(
    output: Path, url: str, model: str, key: str, chosen: tuple[str, ...] = (), limit: int | None = None
) -> list[dict[str, Any]]:
    """Ask about every image of every pair of settings, in both orders; what was answered before is not asked again.

    Args:
        output: folder of a finished evaluation; the answers go to its `judge.jsonl`.
        url: of an OpenAI-compatible server, up to `/v1`.
        model: its name there, one that sees images.
        key: what the server lets in.
        chosen: settings, as the tables call them; none: the first one of each method.
        limit: of the number of images.

    Returns:
        The answers, one for each question.

    Raises:
        ValueError: no evaluation there, no such settings, or the server does not answer.
    """
    from huggingface_hub import InferenceClient

    try:
        study = json.loads((output / "study.json").read_text())
        settings = [str(Setting(**setting)) for setting in study["settings"]]
    except (OSError, KeyError):
        raise ValueError(f"{output}: expected the folder of a finished evaluation") from None
    names = list(chosen)
    if not names:
        methods = [setting["method"] for setting in study["settings"]]
        names = [settings[methods.index(method)] for method in dict.fromkeys(methods)]
    if unknown := set(names) - set(settings):
        raise ValueError(f"no setting {sorted(unknown)}: expected some of {', '.join(settings)}")
    if len(names) < 2:
        raise ValueError(f"expected at least two settings to compare, got {names}")
    rows = {(str(setting), image): row["file"] for (setting, image), row in read_rows(output).items()}
    images = sorted({image for _, image in rows if all((name, image) in rows for name in names)})[:limit]
    prompts = study["identity"]["source"].endswith(".txt")
    client = InferenceClient(base_url=url, api_key=key, timeout=600)
    path = output / "judge.jsonl"
    known = {_key(answer): answer for answer in read_lines(path)}
    questions = [
        {"image": image, "first": a, "second": b, "model": model}
        for image in images
        for pair in combinations(names, 2)
        for a, b in (pair, pair[::-1])
    ]
    for question in tqdm([q for q in questions if _key(q) not in known], desc="judging"):
        prompt = f', made for the prompt "{question["image"]}"' if prompts else ""
        content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION.format(prompt=prompt)}]
        for order in ("first", "second"):
            picture = load_image(image_path(output, question[order], rows[question[order], question["image"]]))
            content += [
                {"type": "text", "text": f"The {order}:"},
                {"type": "image_url", "image_url": {"url": _uri(picture)}},
            ]
        try:
            reply = client.chat_completion([{"role": "user", "content": content}], model=model, temperature=0.0)
            text = reply.choices[0].message.content or ""
        except Exception as error:  # of the network, the server or its answer
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ValueError(
                f"the judge at {url} does not answer ({reason}): check the URL (up to /v1), the model and the key; "
                "what it answered so far is kept"
            ) from None
        words = re.findall(r"\b(first|second|tie)\b", text.lower())
        # The last word, as models that think aloud end with their answer.
        known[_key(question)] = question | {"answer": words[-1] if words else None, "text": text}
        append_line(path, known[_key(question)])
    return [known[_key(question)] for question in questions]


def verdicts(answers: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Of each pair of settings, for each image that was answered in both orders: 1 if the first setting wins, 0 if the
    second, .5 for a tie; and whether the two answers contradict each other. A contradiction is a tie."""
    asked = {(a["model"], a["image"], a["first"], a["second"]): a["answer"] for a in answers}
    points = {"first": 1.0, "second": 0.0, "tie": 0.5}
    found: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for (model, image, a, b), answer in asked.items():
        swapped = asked.get((model, image, b, a))
        if answer is None or swapped is None or (b, a) in found:
            continue
        one, two = points[answer], 1 - points[swapped]
        contradiction = abs(one - two) == 1
        # A preference in one order and a tie in the other is half a one: a tie as well.
        found.setdefault((a, b), []).append((one if one == two else 0.5, contradiction))
    return {
        pair: dict(zip(("score", "contradiction"), map(np.array, zip(*values, strict=True)), strict=True))
        for pair, values in found.items()
    }


def _key(question: dict[str, Any]) -> tuple[str, ...]:
    return tuple(question[name] for name in ("model", "image", "first", "second"))


def _uri(picture: Image.Image) -> str:
    left, top = (max(0, side - SHOWN) // 2 for side in picture.size)
    box = (left, top, left + min(SHOWN, picture.width), top + min(SHOWN, picture.height))
    buffer = io.BytesIO()
    picture.crop(box).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
