"""A BERT small enough to train in a second: random weights and a tokenizer of letters and a few words."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from minibert.model import Bert, BertConfig
from minibert.weights import save_bert

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "is", "not", "good", "bad", "film", "what", "how", "cat", "dog"]
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]
VOCABULARY = [
    *SPECIAL,
    *WORDS,
    *LETTERS,
    *(f"##{letter}" for letter in string.ascii_lowercase + string.digits),
]

TINY = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=128,
)


def build_tiny(folder: Path, with_pooler: bool = True, shape: BertConfig = TINY) -> Path:
    """A checkpoint folder as published ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = Bert(shape, with_pooler)
        for parameter in bert.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    save_bert(bert, folder)
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
