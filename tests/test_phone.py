"""The phone's benchmark without a phone: its commands, its inputs, and a shell that stands in for adb."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from distill.bench import phone
from distill.bench.phone import Adb, bench_phone, measure_command, write_inputs
from distill.cli import app
from distill.errors import BundleError, MissingExtraError

# Runs on this machine what it is told to run on the phone; /data/local/tmp/distill-bench is a folder of the test.
ADB = """#!/bin/sh
echo "$@" >> "$LOG"
[ "$1" = "-s" ] && shift 2
case "$1" in
  devices) printf 'List of devices attached\\nemulator-5554\\tdevice\\nold\\tunauthorized\\n' ;;
  push) cp -r "$2" "$3" ;;
  shell) sh -c "$2" ;;
esac
"""
# Reads its inputs where onnxruntime_perf_test reads them, and prints what that prints.
PERF_TEST = """#!/bin/sh
for word; do model=$last; last=$word; done
[ -f "$(dirname "$model")/test_data_set_0/input_0.pb" ] || { echo "no inputs" >&2; exit 1; }
[ -f "$model" ] || exit 1
echo "Session creation time cost: 0.01 s"
echo "Average inference time cost: 1.5 ms"
echo "P50 Latency: 0.0014 s"
echo "P90 Latency: 0.0018 s"
echo "P99 Latency: 2.5e-03 s"
"""


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `adb` is first on PATH, and which holds the binary and a log of every command."""
    for name, text in (("adb", ADB), ("perf_test", PERF_TEST)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(phone, "PLACE", str(tmp_path / "phone"))
    return tmp_path


def test_the_command_that_measures() -> None:
    command = measure_command(Adb(serial="R58"), "32x1", threads=2, runs=50)
    assert command[:4] == ["adb", "-s", "R58", "shell"]
    place = "/data/local/tmp/distill-bench"
    program, cell = f"{place}/onnxruntime_perf_test", f"{place}/32x1"
    assert command[4] == f"{program} -e cpu -m times -r 50 -x 2 -y 1 -s {cell}/model.onnx {cell}/result.txt"


def test_what_goes_to_the_phones_shell_is_quoted() -> None:
    assert Adb().shell(["rm", "a b; reboot"], ["ls"])[-1] == "rm 'a b; reboot' && ls"


def test_inputs_are_what_the_graph_takes(own_bundle: Path, tmp_path: Path) -> None:
    model = own_bundle / "onnx" / "model_quantized.onnx"
    write_inputs(own_bundle, model, tmp_path, length=9, batch=2)
    names = [one.name for one in onnx.load(model).graph.input]
    for number, name in enumerate(names):
        tensor = onnx.TensorProto()
        tensor.ParseFromString((tmp_path / "test_data_set_0" / f"input_{number}.pb").read_bytes())
        assert tensor.name == name
        assert numpy_helper.to_array(tensor).shape == (2, 9)
    golden = [json.loads(line)["ids"] for line in (own_bundle / "golden.jsonl").read_text().splitlines()]
    tensor.ParseFromString((tmp_path / "test_data_set_0" / f"input_{names.index('input_ids')}.pb").read_bytes())
    assert numpy_helper.to_array(tensor).ravel().tolist() == np.resize(np.concatenate(golden), 18).tolist()


def test_cells_are_measured_and_nothing_stays_behind(own_bundle: Path, adb: Path) -> None:
    cells = bench_phone(own_bundle, adb / "perf_test", lengths=[8, 16], threads=[1, 2], runs=10)
    assert [(cell.length, cell.batch, cell.threads) for cell in cells] == [(8, 1, 1), (8, 1, 2), (16, 1, 1), (16, 1, 2)]
    assert cells[0].row() == ["8", "1", "1", "1.400", "1.800", "2.500"]
    assert not (adb / "phone").exists()
    assert (adb / "log").read_text().count(" -m times -r 10 ") == 4


def test_the_command_line_prints_and_keeps_the_numbers(own_bundle: Path, adb: Path, tmp_path: Path) -> None:
    words = [
        "bench",
        str(own_bundle),
        "--adb",
        str(adb / "perf_test"),
        "--lengths",
        "8",
        "--json",
        str(tmp_path / "b.json"),
    ]
    done = CliRunner().invoke(app, [*words, "--device", "emulator-5554"])
    assert done.exit_code == 0, done.output
    assert "1.400" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["cells"][0]["p99"] == pytest.approx(2.5)


def test_a_phone_that_is_not_there(own_bundle: Path, adb: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"adb sees emulator-5554\. Connect one"):
        bench_phone(own_bundle, adb / "perf_test", adb=Adb(serial="other"))
    with pytest.raises(MissingExtraError, match="this needs adb"):
        bench_phone(own_bundle, adb / "perf_test", adb=Adb(program="no-adb-here"))


def test_what_fails_on_the_phone_is_told_and_tidied_up(own_bundle: Path, adb: Path) -> None:
    (adb / "perf_test").write_text("#!/bin/sh\necho 'illegal instruction' >&2\nexit 132\n")
    with pytest.raises(BundleError, match=r"failed \(illegal instruction\)"):
        bench_phone(own_bundle, adb / "perf_test", lengths=[8])
    assert not (adb / "phone").exists()
    with pytest.raises(BundleError, match="Give onnxruntime_perf_test of an Android build"):
        bench_phone(own_bundle, adb / "nothing")


def test_a_bundle_that_cannot_be_timed_there_is_refused_before_anything_is_pushed(own_bundle: Path, adb: Path) -> None:
    model = own_bundle / "onnx" / "model_quantized.onnx"
    pixels, vector = (onnx.helper.make_tensor_value_info(name, 1, [1, 3, 8, 8]) for name in ("pixel_values", "logits"))
    node = onnx.helper.make_node("Identity", ["pixel_values"], ["logits"])
    images = onnx.helper.make_model(onnx.helper.make_graph([node], "images", [pixels], [vector]))
    onnx.save(images, model)
    with pytest.raises(BundleError, match=r"its graph reads pixel_values, and tokens alone .* Leave --adb out"):
        bench_phone(own_bundle, adb / "perf_test")
    for name in ("encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"):
        onnx.save(images, model.with_name(name))
    model.unlink()
    names = r"encoder_model_quantized\.onnx and decoder_model_merged_quantized\.onnx"
    with pytest.raises(BundleError, match=f"it is in {names}, and one file can be timed on a phone"):
        bench_phone(own_bundle, adb / "perf_test")
    with pytest.raises(BundleError, match=r"model_quantized\.onnx: is not there\. Give the folder of a bundle"):
        bench_phone(own_bundle / "onnx", adb / "perf_test")
    assert " push " not in f" {(adb / 'log').read_text()}"
    assert not (adb / "phone").exists()
