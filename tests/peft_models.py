"""The same adapter in this project and in PEFT: both models, their inputs and what they give."""

from pathlib import Path

import torch
from tiny_bert import TINY
from torch import Tensor, nn

from lora.adapter_io import save_adapter
from lora.methods import METHODS, apply_method
from minibert.model import Bert
from minibert.sequences import Sequences
from minibert.weights import load_bert

FLAGS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}  # of PEFT's LoraConfig
LENGTHS = (9, 16, 5)


def move(model: nn.Module) -> None:
    """Moves A, B and m off their start, by whatever names they go."""
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data += 0.1 * torch.randn(tensor.shape)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, token_type_ids and mask, padded [S, T]"""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, TINY.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids * mask, (torch.arange(max(LENGTHS)) > 3) * mask, mask


def our_hidden(bert: Bert) -> Tensor:
    ids, types, mask = inputs()
    return bert.eval()(ids[mask], types[mask].long(), Sequences(LENGTHS)).detach()  # [M, H]


def our_logits(bert: Bert, classifier: dict[str, Tensor]) -> Tensor:
    first = our_hidden(bert)[[0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]]  # [S, H]
    pooled = torch.tanh(bert.pooler["dense"](first)).detach()
    return pooled @ classifier["weight"].to(pooled).T + classifier["bias"].to(pooled)


def their_output(model: nn.Module) -> Tensor:
    """hidden [M, H], or logits [S, C]"""
    ids, types, mask = inputs()
    with torch.no_grad():
        out = model.eval()(input_ids=ids, token_type_ids=types.long(), attention_mask=mask.long())
    return out.logits if hasattr(out, "logits") else out.last_hidden_state[mask]


def their_hidden(model: nn.Module) -> Tensor:
    """[M, H], of a model with a classifier too"""
    ids, types, mask = inputs()
    given = {"input_ids": ids, "token_type_ids": types.long(), "attention_mask": mask.long()}
    with torch.no_grad():
        return model.eval()(**given, output_hidden_states=True).hidden_states[-1][mask]


def transformers_model(tiny: Path, classes: int | None = None) -> nn.Module:
    """The base model in transformers; its head is random."""
    from transformers import BertForSequenceClassification, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # says that the head is new
    logging.disable_progress_bar()
    if classes is None:
        return BertModel.from_pretrained(tiny)
    return BertForSequenceClassification.from_pretrained(tiny, num_labels=classes)


def open_in_peft(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def made_by_peft(model: nn.Module, folder: Path, rank: int, alpha: float, **settings) -> nn.Module:
    """PEFT's own model, its adapters and its head moved, saved to a folder."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **settings))
    move(model)
    model.save_pretrained(folder)
    return model


def build(tiny: Path, method: str, targets: tuple[str, ...], rank: int, alpha: float) -> Bert:
    bert = load_bert(tiny)
    apply_method(bert, METHODS[method], rank=rank, alpha=alpha, targets=targets)
    move(bert)
    return bert


def save(bert: Bert, folder: Path, method="lora", rank=3, alpha=5.0, **settings) -> Path:
    settings = {"dropout": 0.1, "base": "some/model"} | settings
    save_adapter(bert, folder, method=method, rank=rank, alpha=alpha, **settings)
    return folder
