"""predict.py: a finished run scores files and texts as it did itself, and says what is wrong in a line."""

import csv
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_runs import Ended, call, flags, write_data
from tolerances import TOLERANCE

import predict
import train
from experiments.listing import labelled
from experiments.scored import read_scored
from tasks import STS
from training import evaluate
from training.run_folder import RunFolder, load_run, read_run_config

RUNS = {
    "rslora": {},
    "dora": {"task": "sst", "method": "dora"},
    "full": {"task": "qqp", "method": "full", "pair": "siamese", "pooling": "pooler", "lr": 0.001},
    "frozen": {"method": "frozen", "pooling": "mean", "hidden_layers": 1},
    "lora": {"task": "sst", "method": "lora", "pooling": "pooler", "targets": "query"},
}
DEV = {"sst": "ids-sst-dev.csv", "qqp": "quora-dev.csv", "sts": "sts-dev.csv"}
TEST = {"sst": "ids-sst-test-student.csv", "qqp": "quora-test-student.csv", "sts": "sts-test-student.csv"}


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a finished run with these settings; not to be changed."""
    known: dict[str, Path] = {}

    def run(**changes) -> Path:
        if str(changes) not in known:
            folder = tmp_path_factory.mktemp("finished") / "run"
            ended = call(train.main, *flags(tiny, small_data, out=folder, **changes))
            assert ended.code == 0, ended.err
            known[str(changes)] = folder
        return known[str(changes)]

    return run


@pytest.fixture
def own(finished, tmp_path: Path):
    """A copy of such a folder, to be damaged."""
    return lambda **changes: Path(shutil.copytree(finished(**changes), tmp_path / "run"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_predictions(one: Path, other: Path, within: float) -> None:
    assert one.read_text().splitlines()[0] == other.read_text().splitlines()[0]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a["id"] == b["id"]
        for name in a.keys() - {"id"}:
            assert float(a[name]) == pytest.approx(float(b[name]), abs=within, rel=within)


def assert_refused(ended: Ended, *words: object) -> None:
    assert ended.code == 2
    assert ended.line.startswith("error: ")
    for word in words:
        assert str(word) in ended.line
    assert ended.out == ""


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_reads_back_as_the_model_that_was_trained(
    kind: str, finished, small_data: Path, tmp_path: Path
) -> None:
    folder, task = finished(**RUNS[kind]), RUNS[kind].get("task", "sts")
    for split, files in (("dev", DEV), ("test", TEST)):  # the latter without labels
        output = tmp_path / f"{split}.csv"
        ended = call(predict.main, folder, "--input", small_data / files[task], "--output", output)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out == f"{output}: {len(rows(output))} predictions\n"
        assert_same_predictions(
            output, folder / f"predictions-{split}.csv", TOLERANCE[torch.float32, "encoder"]
        )


@pytest.mark.parametrize("method", ["lora", "dora", "full", "frozen"])
def test_a_bf16_run_is_used_in_the_precision_that_is_asked_for(
    method: str, finished, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(precision="bf16", method=method)
    _, model, _ = load_run(folder)
    assert model.bert.compute_dtype == torch.float32
    assert not model.training
    computed = []

    def noted(model, *rest):
        computed.append(model)
        return evaluate.predict(model, *rest)

    monkeypatch.setattr("training.scoring.predict", noted)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        output = tmp_path / f"{precision}.csv"
        arguments = ["--input", small_data / DEV["sts"], "--output", output, "--precision", precision]
        assert call(predict.main, folder, *arguments).code == 0
        assert computed.pop().bert.compute_dtype == dtype
        assert_same_predictions(output, folder / "predictions-dev.csv", TOLERANCE[torch.bfloat16, "encoder"])
    if method != "full":  # which trains with its vectors in fp32, and is used with all weights in bf16
        assert_same_predictions(output, folder / "predictions-dev.csv", 1e-5)
    assert output.read_bytes() != (tmp_path / "fp32.csv").read_bytes()


@pytest.mark.parametrize(
    "words",
    [("--precision", "auto16"), ("--precision", "fp16"), ("--device", "gpu"), ("--device", "cuda:9")],
    ids=" ".join,
)
def test_a_precision_or_a_device_that_is_not_there_is_refused(words: tuple[str, str], finished) -> None:
    said = ["a", "b", "--precision", "fp32", "--device", "cpu"]
    assert_refused(call(predict.main, finished(), "--text", *said, *words), words[0])


def test_the_batch_size_does_not_matter(finished, small_data: Path, tmp_path: Path) -> None:
    for size in (1, 3, 64):
        arguments = ["--input", small_data / DEV["sst"], "--output", tmp_path / f"{size}.csv"]
        ended = call(predict.main, finished(**RUNS["dora"]), *arguments, "--batch-size", size)
        assert ended.code == 0
        assert_same_predictions(tmp_path / f"{size}.csv", tmp_path / "1.csv", 1e-5)


def test_a_text_is_scored_as_its_row_is(finished, small_data: Path) -> None:
    with open(small_data / DEV["sts"], newline="") as file:
        first = next(csv.DictReader(file, delimiter="\t"))
    ended = call(predict.main, finished(), "--text", first["sentence1"], first["sentence2"])
    score = float(rows(finished() / "predictions-dev.csv")[0]["prediction"])
    assert (ended.code, ended.err) == (0, "")
    assert float(ended.out) == pytest.approx(score, abs=1e-4)

    with open(small_data / DEV["sst"], newline="") as file:
        first = next(csv.DictReader(file, delimiter="\t"))
    dora = finished(**RUNS["dora"])
    ended = call(predict.main, dora, "--text", f"  {first['sentence']} ")
    expected = rows(dora / "predictions-dev.csv")[0]
    label, *shares = ended.out.split()
    assert label == expected["prediction"]
    assert [share.split("=")[0] for share in shares] == ["p0", "p1", "p2", "p3", "p4"]
    for share in shares:
        name, value = share.split("=")
        assert float(value) == pytest.approx(float(expected[name]), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "texts", "got"),
    [
        ("rslora", ["one"], "expected 2 for sts (sentence1 and sentence2), got 1"),
        ("rslora", ["one", "two", "three"], "expected 2 for sts (sentence1 and sentence2), got 3"),
        ("rslora", ["one", " "], "expected 2 for sts (sentence1 and sentence2), got an empty one"),
        ("dora", ["one", "two"], "expected 1 for sst (sentence), got 2"),
        ("dora", [""], "expected 1 for sst (sentence), got an empty one"),
    ],
)
def test_a_task_wants_its_number_of_texts(kind: str, texts: list[str], got: str, finished) -> None:
    assert_refused(call(predict.main, finished(**RUNS[kind]), "--text", *texts), got)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arguments are required: RUN"),
        (["run"], "expected --input FILE with --output FILE, or --text"),
        (["run", "--input", "a", "--output", "b", "--text", "c"], "or --text"),
        (["run", "--input", "a"], "expected --input and --output together"),
        (["run", "--text", "a", "--output", "b"], "expected --input and --output together"),
        (["run", "--text", "a", "--batch-size", "0"], "--batch-size: expected a whole number"),
        (["run", "--text", "a", "--colour"], "unrecognized arguments: --colour"),
        (["run", "--text"], "--text: expected at least one argument"),
        (["no/such/run", "--text", "a"], "no/such/run/config.json: cannot be read"),
        (["no/such/run", "--input", "a", "--output", "b"], "no/such/run/config.json: cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], words: str) -> None:
    assert_refused(call(predict.main, *arguments), words)


def test_a_run_of_several_tasks_is_asked_for_one(finished, small_data: Path, tmp_path: Path) -> None:
    folder = finished(task="sst+sts", method="lora")
    arguments = [folder, "--input", small_data / DEV["sts"], "--output", tmp_path / "p.csv"]
    assert_refused(
        call(predict.main, *arguments), "--task: expected one of the run's tasks, sst, sts; got none"
    )
    assert_refused(call(predict.main, *arguments, "--task", "qqp"), "sst, sts; got 'qqp'")
    assert call(predict.main, *arguments, "--task", "sts").code == 0
    assert_same_predictions(tmp_path / "p.csv", folder / "predictions-dev-sts.csv", 1e-4)
    assert call(predict.main, folder, "--task", "sst", "--text", "good").code == 0


def test_a_run_that_is_not_finished_is_not_used(own) -> None:
    folder = own()
    (folder / "result.json").unlink()
    ended = call(predict.main, folder, "--text", "a", "b")
    assert_refused(
        ended, f"{folder}: the run is not finished; train.py --resume --out {folder} goes on with it"
    )


NEEDED = {
    "rslora": ["config.json", "head.safetensors", "adapter/adapter_config.json",
               "adapter/adapter_model.safetensors", "adapter/minibert.json"],
    "full": ["config.json", "head.safetensors", "model/config.json", "model/model.safetensors",
             "model/tokenizer.json"],
}  # fmt: skip


@pytest.mark.parametrize("how", ["removed", "empty", "cut"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NEEDED for name in NEEDED[kind]])
def test_a_damaged_run_is_said_in_a_line(kind: str, name: str, how: str, own) -> None:
    file = own(**RUNS[kind]) / name
    content = file.read_bytes()
    file.unlink()
    if how != "removed":
        file.write_bytes(b"" if how == "empty" else content[:-10])
    assert_refused(call(predict.main, file.parents[name.count("/")], "--text", "a", "b"), file.parent)


def test_files_of_another_run_do_not_fit(own, finished) -> None:
    folder = own()
    other = finished(**RUNS["frozen"])
    shutil.copy(other / "head.safetensors", folder / "head.safetensors")
    assert_refused(
        call(predict.main, folder, "--text", "a", "b"), folder / "head.safetensors", "does not fit"
    )


def test_what_predicting_does_not_need_may_be_gone(own) -> None:
    folder = own()
    for name in ("metrics.jsonl", "steps.jsonl", "predictions-dev.csv", "predictions-test.csv"):
        (folder / name).unlink()
    assert call(predict.main, folder, "--text", "a", "b").code == 0


def test_a_full_run_needs_nothing_but_its_folder(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    for method in ("full", "lora"):
        arguments = flags(base, small_data, out=tmp_path / method, method=method, max_steps=1, lr=0.001)
        assert call(train.main, *arguments).code == 0
    shutil.rmtree(base)
    assert call(predict.main, tmp_path / "full", "--text", "a", "b").code == 0
    assert_refused(call(predict.main, tmp_path / "lora", "--text", "a", "b"), base)


def test_a_run_is_read_back_from_wherever_one_stands(
    tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    arguments = flags(Path(tiny.name), small_data, out=tmp_path / "run", max_steps=1)
    assert call(train.main, *arguments).code == 0
    monkeypatch.chdir(tmp_path)
    assert call(predict.main, "run", "--text", "a", "b").code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", ":1: expected tab-separated columns id, sentence1, sentence2"),
        ("id,sentence1,sentence2\n1,a,b\n", ":1: expected tab-separated"),
        ("id\tsentence1\tsentence2\n", "expected rows"),
        ("id\tsentence1\tsentence2\n1\ta\t\n2\ta\tb\n", ":2: no sentence2"),
        ("id\tsentence1\tsentence2\n1\ta\tb\n1\tc\td\n", ":3: id '1' is taken by line 2"),
    ],
)
def test_an_input_that_cannot_be_used_is_said_with_its_line(
    content: str | None, words: str, finished, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "in.csv").write_text(content)
    ended = call(predict.main, finished(), "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert_refused(ended, f"{tmp_path / 'in.csv'}", words)
    assert not (tmp_path / "out.csv").exists()


def test_quotes_are_read_as_in_the_runs_data_unless_told(tiny: Path, finished, tmp_path: Path) -> None:
    file, out, plain = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "run"
    file.write_text('id\tsentence1\tsentence2\na\t"cat\tdog\nb\tcat\tdog"\n')
    dev = write_data(tmp_path / "data") / DEV["sts"]
    dev.write_text(dev.read_text().replace("\tdev2\t", '\tdev2\t"').replace("\tdev4\t", '\tdev4\t"'))
    ended = call(train.main, *flags(tiny, tmp_path / "data", out=plain, quotes="plain", max_steps=1))
    assert ended.code == 0
    assert len(read_scored(plain).examples) == 10
    assert labelled(read_run_config(RunFolder(plain)), STS, "dev")[2].texts[0].startswith('"')
    for run, more in ((plain, []), (plain / "adapter", []), (finished(), ["--quotes", "plain"])):
        assert call(predict.main, run, "--input", file, "--output", out, *more).code == 0
        assert [row["id"] for row in rows(out)] == ["a", "b"]
    for run, more in ((plain, ["--quotes", "csv"]), (finished(), [])):
        ended = call(predict.main, run, "--input", file, "--output", out, *more)
        assert_refused(ended, f"{file}:2: expected one row", "add --quotes plain")


def test_a_row_without_text_is_skipped_aloud(finished, tmp_path: Path) -> None:
    lines = ["id\tsentence1\tsentence2", *(f"{i}\ta cat\ta dog" for i in range(150))]
    lines[100] = "99\ta cat\t"
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    ended = call(predict.main, finished(), "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert ended.code == 0
    assert ended.line == f"skipped {tmp_path / 'in.csv'}:101: no sentence2"
    assert [row["id"] for row in rows(tmp_path / "out.csv")] == [str(i) for i in range(150) if i != 99]


@pytest.mark.parametrize("place", ["no/such/folder/out.csv", "folder", "file/out.csv"])
def test_an_output_that_cannot_be_written_is_refused(
    place: str, finished, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / place
    ended = call(predict.main, finished(), "--input", small_data / DEV["sts"], "--output", output)
    assert_refused(ended, f"--output: {output} cannot be written (")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_that_is_not_utf8_is_refused(finished) -> None:
    assert_refused(call(predict.main, str(finished()), "--text", "a cat", "caf\udce9"), "--text", "UTF-8")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": [1]}, "expected files to be an object, got [1]"),
        ({"files": "x"}, "expected files to be an object, got 'x'"),
        ({"files": {}}, "expected files to name head.safetensors, got {}"),
        ({"files": {"head.safetensors": 1}}, "expected sha256 1 as "),
        ({"files": {"head.safetensors": "SAME", "adapter/../../data": "x"}}, "got 'adapter/../../data'"),
        ({"sha256": "x"}, "expected sha256 to be an object, got 'x'"),
        ({"sha256": {"model": "x"}}, "expected model to be an object, got 'x'"),
        ({"sha256": {"model": {"/etc/hosts": "x"}}}, "expected names of files in "),
        ({"config": [1]}, "expected config to be an object, got [1]"),
    ],
    ids=str,
)
def test_a_result_of_other_types_is_a_line_and_skips_no_hash(change: dict, says: str, own) -> None:
    folder = own()
    result = json.loads((folder / "result.json").read_text())
    same = result["files"]["head.safetensors"]
    text = json.dumps(result | change).replace("SAME", same)
    (folder / "result.json").write_text(text)
    assert_refused(call(predict.main, folder, "--text", "a", "b"), folder, says)


@pytest.mark.parametrize("name", [*NEEDED["rslora"], "result.json"])
def test_a_fifo_in_the_place_of_a_file_hangs_nobody(name: str, own) -> None:
    folder = own()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert call(predict.main, folder, "--text", "a", "b").code == 2


def test_an_input_can_be_a_pipe_and_an_output_a_fifo(finished, small_data: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    os.mkfifo(source)
    os.mkfifo(target)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(source.write_bytes, (small_data / DEV["sts"]).read_bytes())
        read = pool.submit(target.read_text)
        ended = call(predict.main, finished(), "--input", source, "--output", target)
        assert (ended.code, ended.err) == (0, "")
        assert read.result().startswith("id,prediction\ndev0,")
    assert target.is_fifo()
