"""An evaluation's images in, which of two methods a vision model prefers out."""

import base64
import io
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixeldecoder.errors import require
from pixeldecoder.evaluation.results import (
    append_line,
    image_path,
    read_finished,
    read_lines,
    read_rows,
    study_settings,
)
from pixeldecoder.pictures import read

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
        ValueError: no evaluation there, no such settings, the server does not answer, or a package of the `evaluate`
            extra is missing.
    """
    require("judge", "evaluate", "jinja2", "matplotlib")  # of the report that follows
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {url}: expected http:// or https://, up to /v1")
    study = read_finished(output)
    settings = [str(setting) for setting in study_settings(study)]
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1")
    names = list(dict.fromkeys(chosen))
    if not names:
        methods = [setting.method for setting in study_settings(study)]
        names = [settings[methods.index(method)] for method in dict.fromkeys(methods)]
    if unknown := set(names) - set(settings):
        raise ValueError(f"no setting {sorted(unknown)}: expected some of {', '.join(settings)}")
    if len(names) < 2:
        raise ValueError(f"expected at least two settings to compare, got {names}")
    rows = {(str(setting), image): row["file"] for (setting, image), row in read_rows(output).items()}
    images = sorted({image for _, image in rows if all((name, image) in rows for name in names)})[:limit]
    if not images:
        raise ValueError(f"{output}: no image is there of all of {', '.join(names)}: evaluate them on the same ones")
    prompts = study["identity"]["source"].endswith(".txt")
    path = output / "judge.jsonl"
    answers = {_key(answer): answer for answer in read_lines(path) if is_answer(answer)}
    questions = [
        {"image": image, "first": a, "second": b, "model": model}
        for image in images
        for pair in combinations(names, 2)
        for a, b in (pair, pair[::-1])
    ]
    for question in tqdm([q for q in questions if _key(q) not in answers], desc="judging"):
        prompt = f', made for the prompt "{question["image"]}"' if prompts else ""
        content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION.format(prompt=prompt)}]
        for order in ("first", "second"):
            picture = read(image_path(output, question[order], rows[question[order], question["image"]])).flattened()
            content += [
                {"type": "text", "text": f"The {order}:"},
                {"type": "image_url", "image_url": {"url": _uri(picture)}},
            ]
        try:
            text = _ask(url, model, key, content)
        except Exception as error:  # of the network, the server or its answer
            detail = f": {error.read().decode(errors='replace')}" if isinstance(error, HTTPError) else ""
            reason = " ".join(f"{error or type(error).__name__}{detail}".split())[:300]
            raise ValueError(
                f"the judge at {url} does not answer ({reason}): check the URL (up to /v1), the model and the key; "
                "what it answered so far is kept"
            ) from None
        words = re.findall(r"\b(first|second|tie)\b", text.lower())
        # The last word, as models that think aloud end with their answer.
        answers[_key(question)] = question | {"answer": words[-1] if words else None, "text": text}
        append_line(path, answers[_key(question)])
    return [answers[_key(question)] for question in questions]


def _ask(url: str, model: str, key: str, content: list[dict[str, Any]]) -> str:
    """Without huggingface_hub, which refuses every request, even to this machine, where HF_HUB_OFFLINE is set."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0.0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=600) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"] or "")


def verdicts(answers: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Of each pair of settings: `score`, for each image that was answered in both orders: 1 if the first setting wins,
    0 if the second, .5 for a tie; `contradiction`, whether the two answers contradict each other, which is a tie; and
    `unanswered`, for every image, whether one of its two answers is missing or says nothing."""
    asked = {_key(answer): answer["answer"] for answer in answers}
    points = {"first": 1.0, "second": 0.0, "tie": 0.5}
    pairs: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for model, image, a, b in asked:
        if (b, a) in pairs and (model, image, b, a) in asked:
            continue  # counted with that one
        pair = (b, a) if (b, a) in pairs else (a, b)
        one, two = (asked.get((model, image, *order)) for order in (pair, pair[::-1]))
        lists = pairs.setdefault(pair, {"score": [], "contradiction": [], "unanswered": []})
        lists["unanswered"].append(one is None or two is None)
        if one is not None and two is not None:
            first, second = points[one], 1 - points[two]
            # A preference in one order and a tie in the other is half a one: a tie as well.
            lists["score"].append(first if first == second else 0.5)
            lists["contradiction"].append(abs(first - second) == 1)
    return {pair: {name: np.array(values) for name, values in lists.items()} for pair, lists in pairs.items()}


def is_answer(content: dict[str, Any]) -> bool:
    """Whether a line of `judge.jsonl` is undamaged."""
    named = all(isinstance(content.get(name), str) for name in ("model", "image", "first", "second"))
    return named and content.get("answer", "") in ("first", "second", "tie", None)


def _key(question: dict[str, Any]) -> tuple[str, str, str, str]:
    return question["model"], question["image"], question["first"], question["second"]


def _uri(picture: Image.Image) -> str:
    left, top = (max(0, side - SHOWN) // 2 for side in picture.size)
    box = (left, top, left + min(SHOWN, picture.width), top + min(SHOWN, picture.height))
    buffer = io.BytesIO()
    picture.crop(box).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
