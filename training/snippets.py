"""How a run's folder is used from Python, as code that runs in it: for each kind of run what opens there.

Nothing in a snippet is a user's text but the base's name, as a Python literal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora.methods import METHODS
from minibert.hub import published
from tasks.base import Task
from training.adapter_folder import SENTENCES
from training.config import Config

EXPORTED = "../exported"  # where a snippet lets `lora.merge` write: not within the run
COMPARED = {  # tasks.heads.FEATURES, for two tensors u and v [B, H]
    "uv": "torch.cat([u, v], dim=1)",
    "uv-diff": "torch.cat([u, v, (u - v).abs()], dim=1)",
    "uv-diff-prod": "torch.cat([u, v, (u - v).abs(), u * v], dim=1)",
    "cosine": "torch.cosine_similarity(u, v, eps=1e-8)[:, None]",
}
POOLED = {  # minibert.pooling, for an `output` of transformers'
    "cls": ("return output.last_hidden_state[:, 0]",),
    "pooler": ("return output.pooler_output",),
    "mean": (
        'mask = inputs["attention_mask"][..., None]',
        "return (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)",
    ),
}


@dataclass(frozen=True)
class Snippet:
    """Code under a heading; what a shell has to do first; and a sentence on it."""

    title: str
    about: str
    code: str
    shell: str = ""


def snippets(config: Config, has_classifier: bool) -> list[Snippet]:
    """Those that work, in this order, in the folder of a run of a complete config.

    `has_classifier`: its head is what transformers' BertForSequenceClassification has.
    """
    found: list[Snippet] = []
    for task in config.tasks:
        for one in of_task(config, task, has_classifier):
            done = one.shell in {other.shell for other in found}
            found.append(replace(one, shell="") if done else one)
    return found


def of_task(config: Config, task: Task, has_classifier: bool) -> list[Snippet]:
    method, own = METHODS[config.method], config.adapters == "per-task"
    of = f" ({task.name})" if len(config.tasks) > 1 else ""
    adapter, exported = "adapter", EXPORTED
    if own:
        adapter, exported = f"adapter-{task.name}", f"{EXPORTED}-{task.name}"
    merge = f"python -m lora.merge {adapter if own else '.'} {exported}"
    kind = "AutoModelForSequenceClassification" if has_classifier else "AutoModel"
    if method.layer:
        outputs = f", num_labels={task.num_outputs}" if has_classifier else ""
        model = f'PeftModel.from_pretrained({kind}.from_pretrained(**base{outputs}), "{adapter}")'
        opened = [f"base = {_base(config)}", _tokenizer("**base")]
        code = _code([*opened, f"model = {model}.eval()"], kind, config, task)
        found = [Snippet(f"PEFT{of}", f"`{adapter}/` on the base model:", code)]
        about = "With the adapter merged into an ordinary checkpoint:"
        code = _code(_opened(f'"{exported}"', kind), kind, config, task)
        found.append(Snippet(f"transformers{of}", about, code, merge))
    elif method.trains_encoder:
        code = _code(_opened('"model"', "AutoModel"), "AutoModel", config, task)
        found = [Snippet(f"transformers{of}", "`model/` is the trained encoder:", code)]
    else:
        opened = [f"base = {_base(config)}", *_opened("**base", "AutoModel")]
        code = _code(opened, "AutoModel", config, task)
        found = [Snippet(f"transformers{of}", "The base model as it is:", code)]
    if config.siamese(task) and config.pooling != "pooler":
        about = "The sentences' vectors, without the head:"
        found.append(Snippet(f"sentence-transformers{of}", about, _vectors(exported), merge))
    return found


def _opened(where: str, kind: str) -> list[str]:
    return [_tokenizer(where), f"model = {kind}.from_pretrained({where}).eval()"]


def _tokenizer(where: str) -> str:
    """One that reads a special token in a text as text, as ours does."""
    return f"tokenizer = AutoTokenizer.from_pretrained({where}, split_special_tokens=True)"


def _vectors(exported: str) -> str:
    code = [
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{exported}")',
        f"vectors = model.encode({_texts(SENTENCES[:2])})",
        "cosine = model.similarity(vectors[:1], vectors[1:]).item()",
    ]
    return "\n".join(code)


def _base(config: Config) -> str:
    """The base as keywords of `from_pretrained`."""
    model = published(config.model)
    name = "pretrained_model_name_or_path"
    if model is None:
        return f"dict({name}={ascii(config.model)})"
    return f"dict({name}={ascii(model.repo)}, revision={ascii(model.revision)})"


def _texts(texts: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{text}"' for text in texts) + "]"


def _code(opened: Sequence[str], kind: str, config: Config, task: Task) -> str:
    """From an opened model of a kind to the logits of an example, [1, C]."""
    has_classifier = kind != "AutoModel"
    imports = ["import torch"]
    imports += ["from peft import PeftModel"] if any("PeftModel" in line for line in opened) else []
    imports += [] if has_classifier else ["from safetensors.torch import load_file"]
    given = "texts, others" if task.is_pair and not config.siamese(task) else "texts"
    result = ["return output.logits"] if has_classifier else POOLED[config.pooling]
    lines = [
        *imports,
        f"from transformers import {kind}, AutoTokenizer",
        "",
        *opened,
        "",
        "",
        f"def encode({given}):",
        f"    cut = dict(truncation=True, max_length={config.max_length})",
        f'    inputs = tokenizer({given}, padding=True, return_tensors="pt", **cut)',
        "    with torch.no_grad():",
        "        output = model(**inputs)",
        *(f"    {line}" for line in result),
        "",
        "",
    ]
    one, other = (_texts([text]) for text in SENTENCES[:2])
    if config.siamese(task):
        lines += [f"u, v = encode({one}), encode({other})", f"x = {COMPARED[config.features]}"]
    else:
        lines.append(f"x = encode({one}{f', {other}' if task.is_pair else ''})")
    return "\n".join([*lines, *(["logits = x"] if has_classifier else _head(config, task))])


def _head(config: Config, task: Task) -> list[str]:
    """From x to the logits, with the heads' file; no dropout, for nothing trains."""
    lines = ['head = load_file("head.safetensors")']
    for i in range(config.hidden_layers):
        name = f"{task.name}.hidden.{i}.1"
        lines.append(f'x = torch.relu(x @ head["{name}.weight"].T + head["{name}.bias"])')
    name = f"{task.name}.output"
    return [*lines, f'logits = x @ head["{name}.weight"].T + head["{name}.bias"]']
