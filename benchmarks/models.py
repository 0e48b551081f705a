"""Checkpoint folders to measure with: a BERT of any shape, its weights random."""

import shutil
from pathlib import Path

import torch
from torch import nn

from minibert.hub import resolve
from minibert.model import Bert, BertConfig
from minibert.weights import read_config, save_bert

VOCABULARY = "all-MiniLM-L6-v2"  # its tokenizer is BERT's uncased one


def write_random_model(folder: Path, config: BertConfig, seed: int = 0) -> Path:
    """Random weights with MiniLM's vocabulary, for programs that read texts."""
    write_random_weights(folder, config, seed)
    shutil.copyfile(resolve(VOCABULARY) / "tokenizer.json", folder / "tokenizer.json")
    return folder


def write_random_weights(folder: Path, config: BertConfig, seed: int = 0, std: float = 0.02) -> Path:
    """Weights and config without a tokenizer: times do not depend on the values, so nothing is downloaded."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        bert = Bert(config)
        for parameter in bert.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
    save_bert(bert, folder)
    return folder


def product_weights(folder: Path) -> int:
    """The encoder's weights that a token is multiplied with: L (4 H² + 2 H I), without attention's scores."""
    config = read_config(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * hidden**2 + 2 * hidden * inner)
