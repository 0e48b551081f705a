"""Sentence vectors, from a finished run, its adapter folder, or a model: texts -> [n, H]."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lora.methods import merge
from minibert.errors import InputError
from minibert.files import replacing, write_safetensors
from minibert.hub import resolve
from minibert.sources import INDEX, PICKLED, WEIGHTS
from minibert.tokenizer import Tokenizer
from minibert.weights import load_bert
from tasks.base import Example, Task
from tasks.data import Dataset
from tasks.model import TaskModel
from training.build import compute_in, default_length, default_pooling
from training.evaluate import encode_once
from training.run_folder import check_unchanged, load_run

MOST_TOKENS = {"cpu": 4096, "cuda": 16384}  # of a batch; on a CPU a seventh faster than 1,024
# What a dataset of sentences alone is of: there is nothing to predict.
TEXTS = Task("texts", {}, ("text",), "", num_outputs=1, label_range=(0, 0), loss="mse", metrics=())


class Encoder:
    """An encoder and its pooling on a device, adapters merged in fp32.

    Attributes:
        model: without heads.
        hidden_size: H.
        about: of a model, its pooling and length and what says so.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, about: str = ""):
        self.model, self.tokenizer, self.about = merge(model).eval(), tokenizer, about
        self.hidden_size = model.bert.config.hidden_size

    @classmethod
    def load(cls, name: str | Path, precision: str = "auto", device: str = "auto") -> "Encoder":
        """From a run's folder or its adapter's, with the run's pooling and length; else from a model.

        A model is a folder of weights or a name, and gets the pooling it was made for and the default length.
        It computes on a CPU or a GPU; `auto` is a GPU where there is one, and the faster precision.

        Raises:
            InputError: if it is none of these, or a file in it is missing, damaged or does not fit.
        """
        path = Path(name)
        if path.is_dir() and not any((path / file).is_file() for file in (WEIGHTS, INDEX, PICKLED)):
            config, model, tokenizer = load_run(path)
            check_unchanged(path, config)
            return cls(TaskModel(model.bert, config.pooling, {}), tokenizer)._in(precision, device)
        folder = resolve(str(name))
        pooling, length = default_pooling(folder), default_length(folder)
        bert = load_bert(folder)
        tokenizer = Tokenizer(folder, length.value, bert.config.vocab_size)
        about = "{} pooling ({}), at most {} tokens ({})".format(*pooling, *length)
        return cls(TaskModel(bert, pooling.value, {}), tokenizer, about)._in(precision, device)

    def _in(self, precision: str, device: str) -> "Encoder":
        self.device = compute_in(self.model.requires_grad_(False), precision, device)
        return self

    def encode(self, texts: Sequence[str], normalize: bool = False) -> np.ndarray:
        """A vector for each text, [n, H] in fp32; of length 1 if `normalize`, so that u·v is their cosine.

        Texts of like length share a batch, whatever their order; each vector is the same as alone.

        Raises:
            InputError: if `texts` is not a list of texts.
        """
        wrong = next((i for i, text in enumerate(texts) if not _is_text(text)), None)
        if isinstance(texts, str) or wrong is not None:
            got = "one text" if wrong is None else f"{texts[wrong]!r} as number {wrong}"
            raise InputError(f"texts: expected a list of texts in UTF-8, got {got}")
        if not texts:
            return np.empty((0, self.hidden_size), np.float32)
        examples = [Example(str(i), (text,), None) for i, text in enumerate(texts)]
        data = Dataset(TEXTS, examples, self.tokenizer)
        for _ in encode_once(self.model, data, self.device, most_tokens=MOST_TOKENS[self.device.type]):
            pass
        vectors = data.features.vectors[0]  # [n, H]
        return (F.normalize(vectors) if normalize else vectors).numpy()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def write_vectors(vectors: np.ndarray, path: Path) -> None:
    """As `embeddings` in a .safetensors file, or as a .npy file.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        if path.suffix == ".safetensors":
            write_safetensors({"embeddings": torch.from_numpy(vectors)}, path)
        else:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, vectors)
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written ({error.strerror})") from None
