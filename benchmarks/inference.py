"""Sentences -> vectors and pairs -> scores, by this project and by sentence-transformers, from one folder.

`python -m benchmarks.inference --side ours --what sentences ...` prints as JSON the seconds of each pass over
the texts. From raw texts to an array both times: tokenizing counts. Each side has batches of its own making;
what is measured is what its user gets.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from minibert.files import read_json, write_safetensors
from minibert.intended import write_intended
from minibert.weights import load_bert
from tasks import TASKS
from tasks.base import Example
from tasks.data import Dataset
from training.build import build_heads, build_tokenizer, compute_in
from training.config import Config, check
from training.embedding import Encoder
from training.evaluate import predict
from training.export import read_back, write_model
from training.precision import DTYPES

Texts = Sequence[str | tuple[str, str]]
Compute = Callable[[Texts], np.ndarray]


def config_of(what: str, max_length: int) -> Config:
    """Sentences: the mean of the hidden states. Pairs: BertForSequenceClassification, with one score."""
    task, pooling = ("sst", "mean") if what == "sentences" else ("sts", "pooler")
    return check(Config(task=task, method="full", pooling=pooling, max_length=max_length))


def write_folders(model: Path, folder: Path, max_length: int) -> None:
    """folder/sentences and folder/pairs: the encoder as `lora.merge` writes a run's; both sides open them."""
    for what in ("sentences", "pairs"):
        config = config_of(what, max_length)
        bert = load_bert(model)
        head = build_heads(config, bert.config.hidden_size)[config.task].output
        classifier = head.state_dict() if what == "pairs" else None
        write_model(bert, classifier, config, torch.float32, folder / what)
        build_tokenizer(config, model).save(folder / what)
        if what == "sentences":
            write_intended(config.pooling, config.max_length, bert.config.hidden_size, folder / what)


def our_sentences(folder: Path, precision: str, max_length: int, device: str = "cpu") -> Compute:
    encoder = Encoder.load(folder, precision, device)
    encoder.tokenizer.max_length = max_length
    return lambda texts: encoder.encode(texts, normalize=True)


def our_pairs(folder: Path, precision: str, max_length: int, device: str = "cpu") -> Compute:
    model, tokenizer = read_back(config_of("pairs", max_length), folder)
    where = compute_in(model.requires_grad_(False), precision, device)

    def compute(texts: Texts) -> np.ndarray:
        data = Dataset(TASKS["sts"], [Example("", pair, None) for pair in texts], tokenizer)
        return predict(model, data, where).predictions

    return compute


def their_sentences(folder: Path, precision: str, max_length: int, device: str = "cpu") -> Compute:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": DTYPES[precision]})
    model.max_seq_length = max_length
    return lambda texts: model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


def their_pairs(folder: Path, precision: str, max_length: int, device: str = "cpu") -> Compute:
    from sentence_transformers import CrossEncoder

    settings = {"device": device, "max_length": max_length, "activation_fn": torch.nn.Identity()}
    model = CrossEncoder(str(folder), model_kwargs={"dtype": DTYPES[precision]}, **settings)
    return lambda texts: model.predict(list(texts), show_progress_bar=False)


SIDES = {
    ("ours", "sentences"): our_sentences,
    ("ours", "pairs"): our_pairs,
    ("peer", "sentences"): their_sentences,
    ("peer", "pairs"): their_pairs,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--side", choices=("ours", "peer"), required=True)
    parser.add_argument("--what", choices=("sentences", "pairs"), required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--folder", type=Path, required=True, help="what write_folders wrote")
    parser.add_argument("--texts", type=Path, required=True, help='JSON: {"sentences": .., "pairs": ..}')
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--passes", type=int, default=1, help="over the texts, each timed")
    parser.add_argument("--save", type=Path, help="write what comes out there, as safetensors")
    given = parser.parse_args()
    texts = [one if isinstance(one, str) else tuple(one) for one in read_json(given.texts)[given.what]]
    settings = given.precision, given.max_length, given.device
    compute = SIDES[given.side, given.what](given.folder / given.what, *settings)
    if given.save:
        write_safetensors({"out": torch.from_numpy(np.float32(compute(texts)))}, given.save)
    seconds = []
    if given.passes:
        compute(texts)  # not timed: libraries choose and keep a kernel for each shape they meet
    for _ in range(given.passes):
        started = time.perf_counter()
        compute(texts)
        seconds.append(time.perf_counter() - started)
    json.dump({"seconds": seconds, "texts": len(texts)}, sys.stdout)


if __name__ == "__main__":
    main()
