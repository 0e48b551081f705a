"""The BERT family: in what each architecture's checkpoints differ from BERT's, by config.json's model_type.

RoBERTa (Liu et al. 2019) and XLM-R (Conneau et al. 2020) count positions from 2, and tell two sentences apart
by `</s></s>` alone. DistilBERT (Sanh et al. 2019) has other names, neither token types nor pooler, and one
dropout fewer. What is computed is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from minibert.errors import InputError
from minibert.files import read_json

CONFIG = "config.json"


class Frame(NamedTuple):
    """What stands around a sentence: tokens before and after it, and the token type of them all."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    token_type: int


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        architecture: what transformers calls the encoder.
        prefix: what stands before its keys in a model with a head.
        processing: what the tokenizers library calls its frames.
        frames: of a first and of a second sentence.
        special: transformers' names of the special tokens, and the tokens.
        fixed: settings that can have one value alone; config.json may leave them out.
        keys: the names of settings in config.json, where BERT has other names.
        defaults: the values of settings that config.json leaves out, where BERT has other values.
        constants: the values of settings that its config.json never has.
        names: parts of parameters' names, ours and theirs, to be replaced in this order.
        first_position: the position of a sequence's first token.
        reads_types: whether the model sees a token's type, 0 or 1; if not, every type is 0.
        drops_attention: whether there is dropout after attention's dense layer.
    """

    architecture: str
    prefix: str
    processing: str
    frames: tuple[Frame, Frame]
    special: Mapping[str, str]
    fixed: Mapping[str, object]
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()
    first_position: int = 0
    reads_types: bool = True
    drops_attention: bool = True

    def published(self, name: str) -> str:
        """A parameter's or module's name in the architecture's checkpoints."""
        for ours, theirs in self.names:
            name = name.replace(ours, theirs)
        return name

    def ours(self, name: str) -> str:
        """The name that `published` came from."""
        for ours, theirs in self.names:
            name = name.replace(theirs, ours)
        return name


BERT = Family(
    architecture="BertModel",
    prefix="bert.",
    processing="BertProcessing",
    frames=(Frame(("[CLS]",), ("[SEP]",), 0), Frame((), ("[SEP]",), 1)),
    special={f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "mask", "unk")},
    fixed={"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
)
ROBERTA = replace(
    BERT,
    architecture="RobertaModel",
    prefix="roberta.",
    processing="RobertaProcessing",
    frames=(Frame(("<s>",), ("</s>",), 0), Frame(("</s>",), ("</s>",), 1)),
    special={f"{name}_token": f"<{name}>" for name in ("pad", "mask", "unk")}
    | {"cls_token": "<s>", "sep_token": "</s>"},
    fixed={**BERT.fixed, "pad_token_id": 1},
    defaults={"vocab_size": 50265},
    first_position=2,  # one past the padding's
    reads_types=False,
)
DISTILBERT = replace(
    BERT,
    architecture="DistilBertModel",
    prefix="distilbert.",
    fixed={"activation": "gelu"},
    keys={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    defaults={"num_hidden_layers": 6},
    constants={"type_vocab_size": 0, "layer_norm_eps": 1e-12},
    names=(
        ("encoder.layer.", "transformer.layer."),
        ("attention.self.query", "attention.q_lin"),
        ("attention.self.key", "attention.k_lin"),
        ("attention.self.value", "attention.v_lin"),
        ("attention.output.dense", "attention.out_lin"),
        ("attention.output.LayerNorm", "sa_layer_norm"),
        ("intermediate.dense", "ffn.lin1"),
        ("output.dense", "ffn.lin2"),
        ("output.LayerNorm", "output_layer_norm"),
    ),
    reads_types=False,
    drops_attention=False,
)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": replace(ROBERTA, architecture="XLMRobertaModel", defaults={}),
    "distilbert": DISTILBERT,
}


def model_type(folder: Path) -> str:
    """The model_type of a checkpoint folder. Raises InputError if it is not one of `FAMILIES`."""
    got = read_json(folder / CONFIG).get("model_type")
    if not isinstance(got, str) or got not in FAMILIES:
        *others, last = FAMILIES
        wanted = f"expected model_type {', '.join(others)} or {last}"
        raise InputError(f"{folder / CONFIG}: {wanted}, got {got!r}: not a BERT this project computes")
    return got
