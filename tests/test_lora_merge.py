"""python -m lora.merge: other libraries open what it writes and compute what the run computes."""

import csv
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Ended, call, finished_runs, flags, strict_json
from tiny_bert import build_tiny
from tolerances import tolerance
from torch import Tensor, nn

import lora.merge as command
import train
from lora.layers import DoRALinear, LoRALinear
from minibert.pooling import POOLINGS
from minibert.sequences import Sequences
from training.run_folder import load_run

ROOT = Path(__file__).parents[1]
RUNS = {
    "lora": {"method": "lora", "targets": "query", "pooling": "cls"},
    "rslora": {"pooling": "mean"},
    "dora": {"task": "sst", "method": "dora", "pooling": "mean", "hidden_layers": 1},
    "full": {"task": "qqp", "method": "full", "lr": 0.001},
    "frozen": {"method": "frozen"},
    "several": {"task": "sst+sts", "pooling": "pooler"},
    "classifier": {"task": "sst", "method": "dora", "pooling": "pooler"},
    "pair classifier": {"task": "qqp", "method": "full", "pooling": "pooler", "lr": 0.001},
    "regression": {"task": "sts", "pooling": "pooler"},
    "siamese": {"pair": "siamese", "pooling": "mean"},
    "siamese cls": {"task": "qqp", "method": "full", "pair": "siamese", "pooling": "cls", "lr": 0.001},
    "siamese pooler": {"method": "frozen", "pair": "siamese", "pooling": "pooler"},
}
CLASSIFIERS = ["classifier", "pair classifier", "regression"]
DEV = {"sst": "ids-sst-dev.csv", "qqp": "quora-dev.csv", "sts": "sts-dev.csv"}
TEXTS = [
    "the cat is not good",
    "A dog, [SEP] film?",
    "what",
    "Café [x] " + "the dog " * 40,
]  # the last is cut
WHOLE = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
POOLING = {
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of RUNS."""
    return finished_runs(tiny, small_data, tmp_path_factory.mktemp("finished"), RUNS, max_steps=4)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory: pytest.TempPathFactory):
    """Such a run's folder, the folder that was made of it, and what was printed."""
    known: dict[str, tuple[Path, Path, str]] = {}

    def make(kind: str) -> tuple[Path, Path, str]:
        if kind not in known:
            out = tmp_path_factory.mktemp("exported") / "out"
            ended = call(command.main, finished(kind), out)
            assert (ended.code, ended.err) == (0, "")
            known[kind] = finished(kind), out, ended.out
        return known[kind]

    return make


def transformers_of(out: Path, auto: str) -> tuple:
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    return getattr(transformers, auto).from_pretrained(out).eval(), tokenizer


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def our_hidden(run: Path, texts: list) -> tuple[list[list[int]], list[Tensor], Tensor]:
    """Each text's ids and hidden states, and the pooled vectors, by the run's own model."""
    config, model, tokenizer = load_run(run)
    encoded = tokenizer(texts)
    sequences = Sequences(tuple(len(one.input_ids) for one in encoded), 0)
    ids = torch.tensor([i for one in encoded for i in one.input_ids])
    types = torch.tensor([i for one in encoded for i in one.token_type_ids])
    with torch.no_grad():
        hidden = model.bert(ids, types, sequences)
        pooled = POOLINGS[config.pooling](model.bert, hidden, sequences)
    return [one.input_ids for one in encoded], list(hidden.split(sequences.lengths)), pooled


@pytest.mark.parametrize("kind", RUNS)
def test_transformers_gives_the_runs_ids_and_hidden_states(kind: str, exported) -> None:
    run, out, _ = exported(kind)
    model, tokenizer = transformers_of(out, "AutoModel")
    for texts in (TEXTS, [(TEXTS[0], TEXTS[1]), (TEXTS[3], TEXTS[2])]):
        ids, hidden, _ = our_hidden(run, texts)
        sides = (texts,) if texts is TEXTS else tuple(map(list, zip(*texts, strict=True)))
        batch = tokenizer(*sides, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**batch).last_hidden_state  # [S, T, H]
        for i, expected in enumerate(hidden):
            real = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][real].tolist() == ids[i]
            torch.testing.assert_close(theirs[i][real], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_transformers_predicts_what_the_run_wrote(kind: str, exported, small_data: Path) -> None:
    run, out, printed = exported(kind)
    task = RUNS[kind]["task"]
    model, tokenizer = transformers_of(out, "AutoModelForSequenceClassification")
    with open(small_data / DEV[task], newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    sides = [[row[name] for row in rows] for name in rows[0] if name.startswith("sentence")]
    with torch.no_grad():
        logits = model(**tokenizer(*sides, padding=True, return_tensors="pt")).logits
    with open(run / "predictions-dev.csv", newline="") as file:
        written = list(csv.DictReader(file))
    if task == "sts":
        got, names = logits, ["prediction"]
    else:
        got, names = logits.softmax(-1), [f"p{c}" for c in range(logits.shape[1])]
    expected = torch.tensor([[float(row[name]) for name in names] for row in written])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # the file has six digits
    assert model.config.problem_type == ("regression" if task == "sts" else "single_label_classification")
    assert "BertForSequenceClassification in fp32" in printed
    assert "head:" not in printed


@pytest.mark.parametrize("kind", ["siamese", "siamese cls"])
def test_sentence_transformers_gives_the_pooled_vectors(kind: str, exported) -> None:
    library = pytest.importorskip("sentence_transformers")
    run, out, _ = exported(kind)
    model = library.SentenceTransformer(str(out), device="cpu")
    vectors = torch.from_numpy(model.encode(TEXTS))
    torch.testing.assert_close(vectors, our_hidden(run, TEXTS)[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", RUNS)
def test_there_is_what_the_report_says(kind: str, exported) -> None:
    run, out, printed = exported(kind)
    siamese = kind in ("siamese", "siamese cls")
    head = set() if kind in CLASSIFIERS else {"head.safetensors"}
    assert files_in(out) == WHOLE | head | (POOLING if siamese else set())
    assert ("sentence-transformers opens it" in printed) == siamese
    for name in head:
        assert (out / name).read_bytes() == (run / name).read_bytes()
        assert f"predict.py {run} computes with it" in printed
    method = RUNS[kind].get("method", "rslora")
    if method in ("full", "frozen"):
        assert f"merged: nothing, {method} has no adapters" in printed
    else:
        assert f"merged: {2 if kind == 'lora' else 12} layers of {method}" in printed
        rows = [line.split() for line in printed.splitlines() if line.split()[0] in command.DTYPE_NAMES]
        assert [row[0] for row in rows] == ["fp32", "bf16", "fp16"]
        assert float(rows[0][1]) < 1e-6 < float(rows[2][1]) < float(rows[1][1]) < 1e-2
        assert all(float(row[3].rstrip("%")) == pytest.approx(100, abs=5) for row in rows)
    (line,) = (line for line in printed.splitlines() if line.startswith("logits:"))
    assert float(line.split("at most ")[1].split()[0]) < 1e-5


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["rslora", "classifier"])
def test_weights_are_kept_in_the_dtype_asked_for(kind: str, name: str, finished, tmp_path: Path) -> None:
    ended = call(command.main, finished(kind), tmp_path / "out", "--dtype", name)
    assert (ended.code, ended.err) == (0, "")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert strict_json((tmp_path / "out" / "config.json").read_text())["torch_dtype"] in str(dtype)
    error = float(ended.out.split("at most ")[1].split()[0])
    assert 0 < error < 0.5  # of a random model's logits
    model, tokenizer = transformers_of(tmp_path / "out", "AutoModel")
    _, hidden, _ = our_hidden(finished(kind), TEXTS[:1])
    with torch.no_grad():
        theirs = model.float()(**tokenizer(TEXTS[:1], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(theirs, hidden[0], **tolerance(dtype))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_the_drift_is_that_of_the_merged_weight(kind: type) -> None:
    layer = kind(nn.Linear(12, 7), rank=3, scaling=2.0)
    nn.init.normal_(layer.lora_B.weight, std=0.01)
    W, A, B = (one.detach().double() for one in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    V = W + 2 * B @ A
    if kind is DoRALinear:
        V = V * (layer.magnitude.detach().double() / V.norm(dim=1)).unsqueeze(1)
    R = V.bfloat16().double()
    drift = command.measure([layer, layer], torch.bfloat16)
    assert drift.error == pytest.approx(((R - V).abs().max() / V.abs().max()).item(), rel=1e-3)
    assert drift.noise == pytest.approx(((R - V).norm() / (V - W).norm()).item(), rel=1e-3)
    assert drift.kept == pytest.approx((((R - W) * (V - W)).sum() / (V - W).square().sum()).item(), rel=1e-3)


def test_an_update_below_the_dtypes_steps_is_lost() -> None:
    layer = LoRALinear(nn.Linear(4, 4, bias=False), rank=1, scaling=1.0)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.lora_A.weight, 2**-6)
    nn.init.constant_(layer.lora_B.weight, 2**-5)  # so ΔW is 2^-11: bf16's step at 1 is 2^-7
    assert command.measure([layer], torch.float32) == (0, 0, 1)
    assert command.measure([layer], torch.bfloat16)[1:] == (1, 0)


def test_a_layer_without_an_update_has_no_share() -> None:
    drift = command.measure([LoRALinear(nn.Linear(4, 4), rank=1, scaling=1.0)], torch.float32)
    assert drift.error == 0
    assert drift.kept != drift.kept


def test_the_run_stays_as_it_is_and_an_empty_folder_is_filled(finished, tmp_path: Path) -> None:
    run = finished("rslora")
    before = {name: (run / name).read_bytes() for name in files_in(run)}
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert call(command.main, run, tmp_path / "link").code == 0
    assert files_in(tmp_path / "there") >= WHOLE
    assert call(command.main, run, tmp_path / "new" / "deep" / "out").code == 0
    assert files_in(tmp_path / "new") == {f"deep/out/{name}" for name in files_in(tmp_path / "there")}
    assert {name: (run / name).read_bytes() for name in files_in(run)} == before


def test_a_base_without_pooler_whose_tokenizer_adds_nothing(small_data: Path, tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base", with_pooler=False)
    tokenizer = strict_json((base / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "[PAD]"}
    changed = tokenizer | {"post_processor": None, "padding": padding}
    (base / "tokenizer.json").write_text(json.dumps(changed))
    run = tmp_path / "run"
    assert call(train.main, *flags(base, small_data, out=run, max_steps=1)).code == 0
    assert call(command.main, run, tmp_path / "out").code == 0
    ids, hidden, _ = our_hidden(run, [(TEXTS[0], TEXTS[1])])
    model, tokenizer = transformers_of(tmp_path / "out", "AutoModel")
    batch = tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt")
    assert batch["input_ids"].tolist() == ids
    with torch.no_grad():
        theirs = model(**batch).last_hidden_state[0]
    torch.testing.assert_close(theirs, hidden[0], atol=1e-5, rtol=1e-5)


def test_a_dtype_that_overflows_is_refused(finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished("full"), tmp_path / "run"))
    state = load_file(run / "model" / "model.safetensors")
    state["encoder.layer.0.output.dense.bias"][0] = 1e5
    save_file(state, run / "model" / "model.safetensors")
    ended = call(command.main, run, tmp_path / "out", "--dtype", "fp16")
    assert_refused(ended, "--dtype: expected one that holds the run's weights, torch.float16 overflows")
    assert sorted(tmp_path.iterdir()) == [run]
    assert call(command.main, run, tmp_path / "out", "--dtype", "bf16").code == 0


def assert_refused(ended: Ended, *words: object) -> None:
    assert ended.code == 2
    assert ended.line.startswith("error: ")
    for word in words:
        assert str(word) in ended.line
    assert ended.out == ""


def test_what_cannot_be_an_output_is_refused(finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished("rslora"), tmp_path / "run"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "loose").symlink_to("loose")
    (tmp_path / "link").symlink_to("run")
    before = sorted(tmp_path.rglob("*"))
    for name, words in {
        "file": "expected a new or empty folder",
        "file/out": f"expected a new or empty folder, {tmp_path / 'file'} is none",
        "full": "expected a new or empty folder",
        "loose": "expected a new or empty folder",
        ".": "expected a new or empty folder",
        "run": "expected a folder outside of the run",
        "run/adapter": "expected a folder outside of the run",
        "run/new/out": "expected a folder outside of the run",
        "link/out": "expected a folder outside of the run",
    }.items():
        assert_refused(call(command.main, run, tmp_path / name), "OUT: ", words)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_finished_run_is_refused(finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(call(command.main, tmp_path / "no", out), "expected a run's folder")
    run = Path(shutil.copytree(finished("rslora"), tmp_path / "run"))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert_refused(call(command.main, run, out), run / "adapter" / "adapter_model.safetensors")
    (run / "result.json").unlink()
    assert_refused(call(command.main, run, out), f"{run}: the run is not finished")
    assert_refused(call(command.main, run, out, "--dtype", "fp8"), "--dtype: invalid choice: 'fp8'")
    assert_refused(call(command.main, run), "arguments are required: OUT")
    assert sorted(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("Tokenizer.save", OSError(errno.ENOSPC, "No space left on device", "x"), 1),
        ("write_intended", KeyboardInterrupt(), 130),
        ("read_back", MemoryError(), 1),
    ],
)
def test_a_failure_leaves_nothing(
    name: str, error: BaseException, code: int, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert list(tmp_path.glob(".merge-*/*/model.safetensors"))  # it fails in the midst of it
        raise error

    monkeypatch.setattr(f"training.export.{name}", fail)
    ended = call(command.main, finished("siamese"), tmp_path / "new" / "out")
    assert ended.code == code
    assert ended.line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_its_codes(finished, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "lora.merge", *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = run(finished("siamese"), tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("merged: 12 layers of rslora")
    again = run(finished("siamese"), tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr == f"error: OUT: expected a new or empty folder, {tmp_path / 'out'} is none\n"
