"""The latency harness on real files in real processes: what is asked, in which order, what is counted."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill.bench import COLUMNS, ROUNDS, TEXT, BenchReport, Cell, Target, bench
from distill.bench.driver import Worker
from distill.bench.harness import rota, shares
from distill.bench.results import Shape, summarise
from distill.bench.targets import find_targets, short_names
from distill.bench.worker import prepare_onnx, random_batch
from distill.errors import BundleError, DistillError, MissingExtraError

TYPES = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT64, "token_type_ids": TensorProto.INT64}


def write_graph(
    path: Path, *, ids: int = 50, inputs: dict[str, int] = TYPES, shape: tuple[Any, Any] = ("batch", "length")
) -> Path:
    """A whole graph of two nodes: the mean of the tokens' rows in a table of `ids` x 4. Unread inputs are listed."""
    table = np.random.default_rng(0).normal(size=(ids, 4)).astype(np.float32)
    first = next(iter(inputs))
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", first], ["rows"]),
            helper.make_node("ReduceMean", ["rows"], ["logits"], axes=[1], keepdims=0),
        ],
        "tiny",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (shape[0], 4))],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


class Recorder:
    """A progress that remembers; its own stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total, self.done = 0.0, 0

    def stage(self, name: str, total: float | None = None, unit: str = "steps") -> Self:
        self.total = total or 0
        return self

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        raise AssertionError(title)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return [write_graph(folder / f"{name}.onnx") for name in ("a", "b", "c")]


@pytest.fixture(scope="module")
def measured(graphs: list[Path]) -> tuple[BenchReport, Recorder]:
    """Three models, four shapes, 25 calls each."""
    recorder = Recorder()
    report = bench(graphs, lengths=[4, 9], batches=[1, 3], threads=[1], runs=25, warmup=1, loads=1, progress=recorder)
    return report, recorder


def test_every_model_is_asked_at_every_shape(measured: tuple[BenchReport, Recorder], graphs: list[Path]):
    report, _ = measured
    shapes = {(cell.target, cell.batch, cell.length) for cell in report.cells}
    assert shapes == {
        (name, batch, length) for name in ("a.onnx", "b.onnx", "c.onnx") for batch in (1, 3) for length in (4, 9)
    }
    assert [target.bytes for target in report.targets] == [path.stat().st_size for path in graphs]
    assert all(target.load_ms > 0 and target.memory_bytes > 0 for target in report.targets)


def test_runs_are_counted_without_the_warm_up(measured: tuple[BenchReport, Recorder]):
    report, _ = measured
    assert {cell.calls for cell in report.cells} == {25}
    assert {len(cell.rounds) for cell in report.cells} == {ROUNDS}


def test_models_take_turns_and_another_begins_each_round(measured: tuple[BenchReport, Recorder]):
    """One model after the other would compare the machine of now with the machine of a minute ago."""
    _, recorder = measured
    turns = [note.split(".onnx, ")[0] for note in recorder.notes if ".onnx, 4 tokens, batch 1" in note]
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab" + "abc" + "bca" + "cab" + "abc"
    assert (recorder.done, recorder.total) == (4 * ROUNDS, 4 * ROUNDS)


@pytest.mark.parametrize("models", [1, 2, 3, 7])
def test_no_model_begins_more_often_than_another_by_more_than_one(models: int):
    order = rota(models, 10)
    begun = [sum(turn[0] == model for turn in order) for model in range(models)]
    assert all(sorted(turn) == list(range(models)) for turn in order)
    assert max(begun) - min(begun) <= 1


@pytest.mark.parametrize("runs", [1, 9, 10, 25, 100])
def test_calls_are_shared_evenly_over_the_rounds(runs: int):
    given = shares(runs)
    assert sum(given) == runs
    assert max(given) - min(given) <= 1


def test_percentiles_are_numpys_of_all_calls():
    rng = np.random.default_rng(0)
    rounds = [[int(value) for value in rng.gamma(4, 1e6, calls)] for calls in (7, 7, 6)]
    first = [[2 * value for value in calls] for calls in rounds]
    cell = summarise("m", Shape(threads=2, batch=4, length=16), rounds, first)
    everything = np.concatenate(rounds) / 1e6
    assert [cell.p50, cell.p90, cell.p99] == pytest.approx(np.percentile(everything, [50, 90, 99]))
    quarters = np.percentile(everything, [25, 75])
    assert cell.spread == pytest.approx((quarters[1] - quarters[0]) / np.median(everything))
    assert cell.rounds == pytest.approx([np.median(calls) / 1e6 for calls in rounds])
    assert (cell.ratio, cell.ratio_low, cell.ratio_high) == pytest.approx((2.0, 2.0, 2.0))
    assert cell.sentences_per_second == pytest.approx(4 * 1000 / cell.p50)
    assert cell.tokens_per_second == pytest.approx(16 * 4 * 1000 / cell.p50)
    assert cell.fastest == everything.min()
    assert cell.calls == 20


def test_ids_are_drawn_from_the_vocabulary_that_a_file_names(tmp_path: Path):
    """A table in blocks of 4 bits answers ids behind its end, so that asking tells nothing."""
    path = write_graph(tmp_path / "model.onnx")
    assert prepare_onnx(path, 1)().count_ids() == 50
    model = onnx.load(path)
    helper.set_model_props(model, {"distill.vocabulary": "40"})
    onnx.save(model, path)
    assert prepare_onnx(path, 1)().count_ids() == 40


def test_the_quartiles_of_the_ratio_are_taken_round_by_round():
    """A machine that slows down halfway slows both: the ratio of the rounds stays."""
    ours, theirs = [[100, 100], [300, 300]], [[200, 200], [600, 600]]
    cell = summarise("m", Shape(1, 1, 8), ours, theirs)
    assert cell.spread == pytest.approx(1.0)
    assert (cell.ratio_low, cell.ratio_high) == pytest.approx((2.0, 2.0))


def test_a_report_comes_back_from_its_json(measured: tuple[BenchReport, Recorder]):
    report, _ = measured
    again = BenchReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    assert again.to_json() == report.to_json()


def test_json_holds_what_a_reader_wants(measured: tuple[BenchReport, Recorder]):
    values = measured[0].to_json()
    assert {"cpu", "flags", "cores", "memory_bytes", "governor", "os"} <= set(values["machine"])
    assert {"distill", "onnxruntime", "numpy"} <= set(values["versions"])
    cell = values["cells"][0]
    assert {"p50", "p90", "p99", "spread", "ratio", "sentences_per_second", "tokens_per_second"} <= set(cell)


def test_tables_have_a_cell_for_every_column(measured: tuple[BenchReport, Recorder]):
    report, _ = measured
    columns, rows = report.table()
    assert columns[-2:] == ["ms at 4", "ms at 9"]
    assert len(rows) == 3 * 2  # models x batch sizes
    assert all(len(row) == len(columns) for row in rows)
    assert all(len(row) == len(COLUMNS) for row in report.rows())
    assert len(report.rows()) == len(report.cells)
    assert [row[COLUMNS.index("times faster")] for row in report.rows() if row[0] == "a.onnx"] == ["1.00x"] * 4


def test_ratios_are_against_the_first_model(measured: tuple[BenchReport, Recorder]):
    report, _ = measured
    first, other = (report.cell(name, length=9, batch=3) for name in ("a.onnx", "c.onnx"))
    assert report.ratio("c.onnx", length=9, batch=3) == pytest.approx(first.p50 / other.p50)
    with pytest.raises(KeyError, match=r"no cell for c\.onnx at 77 tokens, batch 1, threads 1"):
        report.cell("c.onnx", length=77)


def test_a_time_limit_ends_a_cell_after_a_whole_round(graphs: list[Path]):
    report = bench(graphs[:2], lengths=[4], runs=35, seconds=0.0, loads=1)
    assert [cell.calls for cell in report.cells] == [4, 4]  # the first of ten rounds of 35 calls


def test_every_thread_count_has_cells_of_its_own(graphs: list[Path]):
    report = bench(graphs[:1], lengths=[4], threads=[2, 1, 2], runs=3, loads=1)
    assert [cell.threads for cell in report.cells] == [2, 1]
    assert report.targets[0].threads == 2  # what load time and memory were measured with


@pytest.mark.parametrize("ids", [1, 2, 3, 50, 64, 65])
def test_ids_are_drawn_from_the_whole_vocabulary_and_never_beyond(tmp_path: Path, ids: int):
    """An id past a trimmed vocabulary would stop the run, one range for all would read a corner of the table."""
    (target,) = find_targets([write_graph(tmp_path / "m.onnx", ids=ids)])
    with Worker(target, 1) as worker:
        assert worker.loaded["vocabulary"] == ids
        asked = {"batch": 2, "length": 200, "ids": ids, "calls": 1}
        assert len(worker.ask(asked)["ns"]) == 1
    drawn = random_batch(2, 1000, ids)
    assert set(np.unique(drawn["input_ids"])) == set(range(ids))
    assert drawn["attention_mask"].all()


def test_models_of_different_vocabularies_are_asked_the_same(tmp_path: Path):
    """The smaller vocabulary decides: the larger table's ids would stop the other model."""
    paths = [write_graph(tmp_path / "large.onnx", ids=900), write_graph(tmp_path / "small.onnx", ids=7)]
    assert len(bench(paths, lengths=[30], runs=2, loads=1).cells) == 2


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": TensorProto.INT64},
        {"input_ids": TensorProto.INT32, "attention_mask": TensorProto.INT32},
        {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.FLOAT, "position_ids": TensorProto.INT64},
    ],
)
def test_a_graph_is_fed_what_its_inputs_list(tmp_path: Path, inputs: dict[str, int]):
    path = write_graph(tmp_path / "m.onnx", inputs=inputs)
    assert bench([path], lengths=[5], runs=2, loads=1).cells[0].calls == 2


def test_a_graph_of_a_fixed_shape_is_measured_at_that_shape_and_no_other(tmp_path: Path):
    path = write_graph(tmp_path / "fixed.onnx", shape=(1, 16))
    assert bench([path], lengths=[16], runs=2, loads=1).cells[0].calls == 2
    with pytest.raises(
        BundleError, match=r"fixed\.onnx: cannot be measured at 32 tokens, batch 1, threads 1 \("
    ) as told:
        bench([path], lengths=[32], runs=2, loads=1)
    assert "\n" not in str(told.value)


def test_an_input_that_cannot_be_filled_is_named(tmp_path: Path):
    path = write_graph(tmp_path / "vision.onnx", inputs={"pixels": TensorProto.INT64})
    with pytest.raises(BundleError, match=r"its input 'pixels' is none that bench can fill\)\. Give a graph"):
        bench([path], loads=1)


def broken(folder: Path) -> Path:
    (folder / "broken.onnx").write_bytes(b"this is no graph")
    return folder / "broken.onnx"


def empty(folder: Path) -> Path:
    return folder


def pickled(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    return folder


def unnamed(folder: Path) -> Path:
    write_graph(folder / "onnx" / "model.onnx")
    return folder


def text_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("a")
    return folder / "notes.txt"


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: folder / "absent.onnx", r"absent\.onnx: is not there\. Give FILE\.onnx"),
        (broken, r"broken\.onnx: cannot be loaded \(it is no ONNX file\)\. Copy the whole bundle again\."),
        (empty, r"is neither an ONNX file, nor a bundle, nor a PyTorch checkpoint\. Give FILE\.onnx"),
        (pickled, r"Its weights are pickled, which can run code: save them as safetensors first\."),
        (unnamed, r"It holds onnx/model\.onnx: name the file\."),
        (text_file, r"notes\.txt: is neither an ONNX file"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(tmp_path: Path, make: Any, said: str):
    with pytest.raises(BundleError, match=said) as told:
        bench([make(tmp_path)], lengths=[4], runs=1, loads=1)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lengths": []}, "bench: lengths is empty. Give at least one"),
        ({"batches": [1, 0]}, "bench: batches holds 0. Give whole numbers of at least 1."),
        ({"threads": [-1]}, "bench: threads holds -1"),
        ({"runs": 0}, "bench: runs holds 0"),
        ({"warmup": -1}, "bench: warmup holds -1. Give whole numbers of at least 0."),
        ({"loads": 0}, "bench: loads holds 0"),
    ],
)
def test_settings_that_make_no_sense_are_told_before_anything_runs(graphs: list[Path], settings: Any, said: str):
    with pytest.raises(DistillError, match=said):
        bench(graphs, **settings)
    with pytest.raises(BundleError, match=r"bench: there is nothing to measure\. Name at least one"):
        bench([])


def test_a_process_that_is_killed_is_an_error_and_no_hang(graphs: list[Path]):
    (target,) = find_targets(graphs[:1])
    with Worker(target, 1) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DistillError, match=r"a\.onnx: its process was killed by SIGKILL\. Measure it alone"):
            worker.ask({"memory": True})


def test_what_a_dying_process_said_last_is_told(tmp_path: Path, tiny_start: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch.py").write_text("import sys; sys.exit('this torch wants a newer processor')")
    (tmp_path / "transformers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (target,) = find_targets([tiny_start])
    with pytest.raises(DistillError, match=r"ended with exit code 1, saying 'this torch wants a newer processor'\. "):
        Worker(target, 1).__enter__()


def test_a_process_ends_when_its_driver_is_gone(graphs: list[Path]):
    (target,) = find_targets(graphs[:1])
    with Worker(target, 1) as worker:
        worker._process.stdin.close()
        assert worker._process.wait(timeout=20) == 0


def test_a_run_that_fails_leaves_no_process_behind(tmp_path: Path, graphs: list[Path]):
    psutil = pytest.importorskip("psutil", reason='needs pip install "distill[bench]"')
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(BundleError, match="cannot be loaded"):
        bench([*graphs, broken(tmp_path)], lengths=[4], runs=1, loads=1)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_modules_in_the_folder_a_person_stands_in_are_not_run(
    tmp_path: Path, graphs: list[Path], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    assert bench(graphs[:1], lengths=[4], runs=1, loads=1).cells


def test_measuring_onnx_needs_no_torch(tmp_path: Path, graphs: list[Path]):
    """The base install has none: neither the driver nor the workers may import it."""
    for name in ("torch", "transformers", "onnx"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the base install has none of these')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from distill.bench import bench; "
    code += f"print(len(bench([{str(graphs[0])!r}], lengths=[4], runs=1, loads=1).cells))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


def test_a_checkpoint_without_torch_names_the_install(tiny_start: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r'pip install "distill\[train\]"'):
        bench([tiny_start])


def test_a_checkpoint_and_a_bundle_are_measured_side_by_side_on_real_text(tiny_start: Path, tiny_bundle: Path):
    from tokenizers import Tokenizer

    texts = ["where is my new card", "hello", "what pounds cost today"]
    report = bench([tiny_start, tiny_bundle], lengths=[8], batches=[2], texts=texts, runs=4, loads=1)
    assert [target.format for target in report.targets] == ["PyTorch", "ONNX"]
    assert report.targets[0].bytes == (tiny_start / "model.safetensors").stat().st_size
    assert [(cell.length, cell.calls) for cell in report.cells] == [(8, 4), (8, 4), (TEXT, 4), (TEXT, 4)]
    tokenizer = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    tokenizer.no_padding()
    counts = [len(found.ids) for found in tokenizer.encode_batch(texts)]
    assert report.cells[-1].tokens == pytest.approx(sum(counts) / 3)
    assert report.table()[0][-1] == "ms, text"
    assert BenchReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_text_without_a_tokenizer_is_refused(graphs: list[Path]):
    with pytest.raises(BundleError, match=r"cannot be measured on texts \(there is no tokenizer\.json beside it"):
        bench(graphs[:1], lengths=[], texts=["hello"], loads=1)


def test_an_architecture_that_transformers_lacks_is_named(tmp_path: Path, tiny_start: Path):
    """Whatever the file names must be a model class: `architectures` of a stranger's file is no licence to call."""
    config = json.loads((tiny_start / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    (tmp_path / "model.safetensors").write_bytes((tiny_start / "model.safetensors").read_bytes())
    with pytest.raises(BundleError, match=r"names the architecture 'pipeline', which transformers .* lacks"):
        bench([tmp_path], lengths=[4], loads=1)


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/x/a.onnx", "/x/b.onnx"], ["a.onnx", "b.onnx"]),
        (["/x/a/model.onnx", "/x/b/model.onnx", "/x/c.onnx"], ["a/model.onnx", "b/model.onnx", "c.onnx"]),
        (["/x/a/onnx/model.onnx", "/x/b/onnx/model.onnx"], ["a/onnx/model.onnx", "b/onnx/model.onnx"]),
        (["/x/a.onnx", "/x/a.onnx"], ["a.onnx #1", "a.onnx #2"]),
        (["/model.onnx", "/a/model.onnx"], ["/model.onnx", "a/model.onnx"]),
    ],
)
def test_names_are_short_and_tell_models_apart(paths: list[str], names: list[str]):
    assert short_names(paths) == names


CELL = Cell("student", 1, 1, 16, p50=1.0, p90=1.1, p99=1.2, fastest=0.9, spread=0.01, calls=200, tokens=16.0, ratio=4.0)
QUIET = BenchReport(
    targets=[Target("teacher", "t.onnx", "ONNX", 100), Target("student", "s.onnx", "ONNX", 20)],
    cells=[replace(CELL, target="teacher", p50=4.0, ratio=1.0), CELL],
    created="2026-01-01T00:00:00+00:00",
    machine={"cpu": "A CPU", "flags": ["avx2"], "cores": 4, "cpu_limit": None, "governor": None},
    load_average=(0.1, 0.9),
)


def changed(**cell: Any) -> BenchReport:
    return replace(QUIET, cells=[QUIET.cells[0], replace(CELL, **cell)])


@pytest.mark.parametrize(
    "report, said",
    [
        (changed(spread=0.4), "noisy: in 1 of 2 cells .* more than 15% of the median (worst 40%)"),
        (changed(ratio=0.8), "no gain: student is 0.80x as fast as teacher at 16 tokens, batch 1, threads 1"),
        (changed(ratio=1.04), "no gain: student is 1.04x as fast"),
        (changed(threads=8), "threads beyond the 4 cores of this machine"),
        (replace(QUIET, machine={**QUIET.machine, "governor": "powersave"}), "the frequency governor is powersave"),
        (replace(QUIET, machine={**QUIET.machine, "cpu_limit": 0.5}), "this container may use 0.5 cores' worth"),
        (replace(QUIET, load_average=(3.2, 3.0)), "other work was running: load average 3.2 on 4 cores"),
    ],
)
def test_what_makes_numbers_doubtful_is_said_and_only_then(report: BenchReport, said: str):
    import re

    pattern = re.escape(said).replace(r"\.\*", ".*")
    assert any(re.search(pattern, note) for note in report.notes())
    assert QUIET.notes() == ["A CPU (avx2), 4 cores; medians of 200 interleaved calls of each model, ms"]


def test_few_calls_make_no_99th_percentile():
    assert "p99 of so few calls is close to their slowest" in changed(calls=30).notes()[0]


def test_what_the_system_does_not_tell_is_left_empty():
    columns, rows = QUIET.table()
    by_name = dict(zip(columns, rows[0], strict=True))
    assert (by_name["load ms"], by_name["memory MB"]) == ("", "")
    assert by_name["ms at 16"] == "4.00 (1.0x)"
