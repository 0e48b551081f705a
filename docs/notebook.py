# The source of notebook.ipynb, which `python docs/make_notebook.py` writes from it.
# ruff: noqa: E402  (a cell's imports stand in the cell)

# %% [markdown]
# # LoRA and full fine-tuning, side by side
#
# From nothing to two trained models, their scores, and a look at what one of them does, on a CPU or a GPU.
# Run all cells from top to bottom; each says why it is there. Colab has a free T4 under *Runtime, Change
# runtime type*; a laptop's CPU takes some minutes.

# %% [markdown]
# The settings stand first, so that a smaller, larger or other run needs no other cell to change. A run that
# is finished is not made again: after a change here, give `OUT` another name.

# %% tags=["parameters"]
REPOSITORY = ""  # where to clone the project from, if this is not opened inside of it
MODEL = "all-MiniLM-L6-v2"
DATA = "demo"  # built in: 600 pairs of sentences, and how alike they are, from 0 to 5
EPOCHS = 3
BATCH_SIZE = 32
MAX_LENGTH = 128
OUT = "runs/notebook"
COURSE_DATA = ""  # the folder of your own files, for the last cell
ONE, OTHER = "A cat is asleep on the sofa.", "The cat sleeps on a couch."

# %% [markdown]
# The commands and the imports below need the project: the folder that this notebook was opened in, or else
# a clone of it, with what it needs installed.

# %%
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
places = [here, *here.parents, here / "minibert-project"]
root = next((one for one in places if (one / "train.py").is_file() and (one / "minibert").is_dir()), None)
if root is None:
    if not REPOSITORY:
        raise RuntimeError(
            "Open this inside the project, or set REPOSITORY to the address you clone it from."
        )
    root = places[-1]
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(root)], check=True)
needed = ("torch", "tokenizers", "safetensors", "matplotlib")
if root == places[-1] or any(importlib.util.find_spec(name) is None for name in needed):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{root}[notebook]"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))
print(root)

# %% [markdown]
# Runs are made by the project's own commands, as a terminal would: this calls one, shows what it says as it
# says it, and stops the notebook if it fails.


# %%
def run(*words):
    words = [str(word) for word in words]
    print("$ python", shlex.join(words), flush=True)
    command = [sys.executable, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with exit code {process.returncode}; the line above says why.")


# %% [markdown]
# The precision is the fastest sound one: fp16 on a T4, bf16 on newer GPUs. On a CPU the matrix products of
# this model are timed in fp32 and in bf16. A run chooses by the same two functions; what trains is kept in
# fp32 everywhere.

# %%
import torch

from minibert.hub import resolve
from minibert.weights import read_config
from training.precision import choose_device, choose_precision

device = choose_device("auto")
choice = choose_precision("auto", device, read_config(resolve(MODEL)))
precision = choice.precision
if device.type == "cuda":
    major, minor = torch.cuda.get_device_capability(device)
    print(f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}: {precision}")
else:
    print(f"CPU, {torch.get_num_threads()} threads: {precision} ({choice.reason})")

# %% [markdown]
# LoRA first: the encoder is frozen, and small matrices beside its layers learn. `--resume` goes on with a
# run that was stopped, and leaves a finished one as it is.

# %%
LORA, FULL = Path(OUT, "lora"), Path(OUT, "full")
settings = ["--task", "sts", "--model", MODEL, "--data", DATA, "--pooling", "mean"]
settings += ["--epochs", EPOCHS, "--batch-size", BATCH_SIZE, "--max-length", MAX_LENGTH]
settings += ["--device", device, "--precision", precision]
run("train.py", "--method", "lora", *settings, "--out", LORA, "--resume")

# %% [markdown]
# Then full fine-tuning, so that there is something to compare with: the same data in the same order, every
# weight of every layer trained.

# %%
run("train.py", "--method", "full", *settings, "--out", FULL, "--resume")

# %% [markdown]
# One table says what each has trained, reached and cost. It is of one seed and 144 dev pairs: a standard
# error is about .02, and a smaller difference between the two says nothing.

# %%
from IPython.display import HTML, Markdown, display

from experiments.summary import markdown, read_records, rows

display(Markdown(markdown(rows(read_records([LORA, FULL])))))

# %% [markdown]
# A score alone hides how long it took, so here is dev against the seconds of training, a point for each
# epoch.

# %%
import json

import matplotlib.pyplot as plt

for path in (LORA, FULL):
    epochs = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    seconds = [sum(one["seconds"] for one in epochs[: i + 1]) for i in range(len(epochs))]
    plt.plot(seconds, [one["dev"] for one in epochs], marker="o", label=path.name)
plt.xlabel("seconds of training")
plt.ylabel("dev Pearson")
plt.legend()
plt.show()

# %% [markdown]
# Scores are of other people's sentences; try your own. The answer is how alike the two are, from 0 to 5.

# %%
for pair in [(ONE, OTHER), (ONE, "A dog is asleep on the sofa."), (ONE, "Interest rates rose again.")]:
    run("predict.py", LORA, "--text", *pair)

# %% [markdown]
# Now the same answer by hand, in fp32, from the trained model itself: tokens, hidden states, their mean,
# the head.

# %%
import numpy as np

from tasks import TASKS
from tasks.data import Dataset
from training.run_folder import load_run
from training.scoring import text_example

config, model, tokenizer = load_run(LORA)
data = Dataset(TASKS["sts"], [text_example(TASKS["sts"], [ONE, OTHER])], tokenizer, False)
batch = data.collate(np.zeros(1, int))
with torch.no_grad():
    hidden = model.bert(batch.input_ids, batch.token_type_ids, batch.sequences)  # [M, H]
    pooled = model.pool(model.bert, hidden, batch.sequences)  # [1, H]
    score = model.heads["sts"](pooled).item()
count = batch.sequences.lengths[0]  # what fills the row up to a round number is no part of the sequence
print(f"score {score:.4f}, of these tokens:", *tokenizer.tokens(batch.input_ids[:count].tolist()))

# %% [markdown]
# LoRA's claim is that `x Wᵀ + s · x Aᵀ Bᵀ` is a dense layer with the weight `W + s · B A`, and that A and B
# get the gradients which that weight's own implies. Here it is checked on a layer that was just trained, in
# fp64.

# %%
import copy

layer = copy.deepcopy(model.bert.get_submodule("encoder.layer.0.attention.self.query")).double()
W, A, B, s = layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling
x = torch.randn(7, layer.in_features, dtype=torch.float64)
dy = torch.randn(7, layer.out_features, dtype=torch.float64)
y = layer(x)
dA, dB = torch.autograd.grad(y, (A, B), dy)

dense = (W + s * B @ A).detach().requires_grad_()
expected = x @ dense.T + layer.bias
(dW,) = torch.autograd.grad(expected, dense, dy)
checks = {"y": (y, expected), "dA = s Bᵀ dW": (dA, s * B.T @ dW), "dB = s dW Aᵀ": (dB, s * dW @ A.T)}
errors = {name: ((got - want).abs().max() / want.abs().max()).item() for name, (got, want) in checks.items()}
for name, error in errors.items():
    print(f"{name:<14} off by {error:.1e}")
    assert error < 1e-10

# %% [markdown]
# So an adapter can be merged away: a plain checkpoint, no slower than the base, with the same answer.

# %%
import shutil

from minibert.weights import load_bert

MERGED = Path(OUT, "merged")
shutil.rmtree(MERGED, ignore_errors=True)
run("-m", "lora.merge", LORA, MERGED)
with torch.no_grad():
    plain = load_bert(MERGED).eval()
    hidden = plain(batch.input_ids, batch.token_type_ids, batch.sequences)  # [M, H]
    merged_score = model.heads["sts"](model.pool(plain, hidden, batch.sequences)).item()
print(f"merged {merged_score:.4f}, with its adapter {score:.4f}")
assert abs(merged_score - score) < 1e-3

# %% [markdown]
# The adapter's folder is in PEFT's format, so PEFT, where it is installed, must say the same as well: its
# layers, and transformers' BERT under them, share no code with ours.

# %%
from minibert.hub import resolve

peft_score = None
if all(importlib.util.find_spec(name) for name in ("peft", "transformers")):
    from peft import PeftModel
    from transformers import BertModel

    theirs = PeftModel.from_pretrained(BertModel.from_pretrained(resolve(MODEL)), LORA / "adapter").eval()
    ids, types = batch.input_ids[None, :count], batch.token_type_ids[None, :count]  # [1, T]
    with torch.no_grad():
        hidden = theirs(input_ids=ids, token_type_ids=types).last_hidden_state  # [1, T, H]
        peft_score = model.heads["sts"](hidden.mean(1)).item()
    print(f"PEFT {peft_score:.4f}, ours {score:.4f}")
    assert abs(peft_score - score) < 1e-3
else:
    print("PEFT is not installed: pip install peft transformers")

# %% [markdown]
# What did the model look at? The page of one example shows what each word adds to the score, every head's
# attention, and the training pairs most like it. It is a single file, `explanation.html`, shown here in a
# frame.

# %%
import html

PAGE = Path(OUT, "explanation.html")
run("-m", "experiments.explain", LORA, "--text", ONE, "--pair", OTHER, "--out", PAGE)
source = html.escape(PAGE.read_text(encoding="utf-8"))
display(HTML(f'<div><iframe srcdoc="{source}" width="100%" height="700"></iframe></div>'))

# %% [markdown]
# The course's own files need one flag more: `--data`, and the folder in which they lie, under the names that
# are printed here. Put the folder's whole path into `COURSE_DATA` at the top.

# %%
if COURSE_DATA:
    own = [*settings, "--method", "lora", "--data", COURSE_DATA, "--out", Path(OUT, "course"), "--resume"]
    run("train.py", *own)
else:
    for task in TASKS.values():
        print(f"{task.name}: {', '.join(task.files.values())}")

# %% [markdown]
# From here: `python -m lora.verify RUN` checks every claim of the mathematics as above, for rsLoRA and DoRA
# too; `--method rslora`, `dora` or `frozen` trains them; `python -m experiments.compare` says whether two
# settings differ by more than chance. The README lists the rest.
