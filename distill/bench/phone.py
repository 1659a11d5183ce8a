"""Latency on a connected Android phone: ONNX Runtime's own `onnxruntime_perf_test`, fed by adb.

The binary comes with an Android build of ONNX Runtime (`./build.sh --android ... --build_shared_lib`). For each cell it
gets a folder with the model and `test_data_set_0/input_N.pb`, which is where it looks for inputs.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from distill.errors import BundleError, MissingExtraError, needs_extra
from distill.export.pieces import files_of
from distill.files import json_lines
from distill.progress import SILENT, Progress

PLACE = "/data/local/tmp/distill-bench"
"""On the phone: shell users may write and run there."""

TOOL = "onnxruntime_perf_test"
_HERE = "Leave --adb out: it is then measured on this machine."
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs that can be fed there."""

COLUMNS = ["length", "batch", "threads", "p50 ms", "p90 ms", "p99 ms"]
_LATENCY = re.compile(r"^P(50|90|99) Latency: ([\d.eE+-]+) s", re.MULTILINE)


@dataclass(frozen=True)
class PhoneCell:
    """One measured cell; milliseconds."""

    length: int
    batch: int
    threads: int
    p50: float
    p90: float
    p99: float

    def row(self) -> list[str]:
        """As `COLUMNS` has it."""
        return [
            *map(str, (self.length, self.batch, self.threads)),
            *(f"{v:.3f}" for v in (self.p50, self.p90, self.p99)),
        ]


@dataclass(frozen=True)
class Adb:
    """The commands that a phone is spoken to with.

    Attributes:
        program: `adb`, or a path to it.
        serial: Of the phone, where several are connected.
    """

    program: str = "adb"
    serial: str = ""

    def push(self, source: Path, place: str) -> list[str]:
        """Copies a file or a folder to the phone."""
        return [*self._begin(), "push", str(source), place]

    def shell(self, *steps: Sequence[str]) -> list[str]:
        """Runs steps on the phone, each only where the one before succeeded; every word is quoted for its shell."""
        return [*self._begin(), "shell", " && ".join(shlex.join(step) for step in steps)]

    def devices(self) -> list[str]:
        """Lists what is connected."""
        return [self.program, "devices"]

    def _begin(self) -> list[str]:
        return [self.program, *(["-s", self.serial] if self.serial else [])]


def measure_command(adb: Adb, cell: str, *, threads: int, runs: int) -> list[str]:
    """Times the model of one cell's folder: CPU, `runs` calls, its statistics printed."""
    program = f"{PLACE}/{TOOL}"
    options = ["-e", "cpu", "-m", "times", "-r", str(runs), "-x", str(threads), "-y", "1", "-s"]
    return adb.shell([program, *options, f"{PLACE}/{cell}/model.onnx", f"{PLACE}/{cell}/result.txt"])


def bench_phone(
    bundle: str | Path,
    perf_test: str | Path,
    *,
    adb: Adb | None = None,
    lengths: Sequence[int] = (16, 32, 64, 128),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    runs: int = 100,
    progress: Progress = SILENT,
) -> list[PhoneCell]:
    """Measures a bundle's int8 file on the phone that adb is connected to; what it put there is removed.

    Args:
        bundle: Its folder; the tokens of its golden texts are what the model reads.
        perf_test: `onnxruntime_perf_test` for the phone's processor.
        adb: How the phone is spoken to.
        lengths: Sequence lengths in tokens.
        batches: Sentences a call.
        threads: Threads of the session.
        runs: Timed calls a cell.
        progress: Told about cells.

    Raises:
        BundleError: The bundle is in two files, reads something other than tokens or has no golden ones, before
            anything is pushed; or a step on the phone fails.
        MissingExtraError: adb is not installed or no phone is connected, or `onnx` is missing.
    """
    adb, binary = adb or Adb(), Path(perf_test)
    if not binary.is_file():
        raise BundleError("is not there", where=str(binary), fix=f"Give {TOOL} of an Android build of ONNX Runtime.")
    model = _model_of(Path(bundle))
    _check_connected(adb)
    cells = list(product(lengths, batches, threads))
    found = []
    with (
        tempfile.TemporaryDirectory() as place,
        progress.stage("On the phone", total=len(cells), unit="cells") as stage,
    ):
        for length, batch in product(lengths, batches):
            write_inputs(Path(bundle), model, Path(place) / f"{length}x{batch}", length=length, batch=batch)
        _run(adb.shell(["mkdir", "-p", PLACE]))
        try:
            _run(adb.push(binary, f"{PLACE}/{TOOL}"))
            _run(adb.push(model, f"{PLACE}/model.onnx"))
            _run(adb.shell(["chmod", "755", f"{PLACE}/{TOOL}"]))
            for length, batch, count in cells:
                name = f"{length}x{batch}"
                _run(adb.push(Path(place) / name, PLACE))
                _run(adb.shell(["ln", "-sf", f"{PLACE}/model.onnx", f"{PLACE}/{name}/model.onnx"]))
                said = _run(measure_command(adb, name, threads=count, runs=runs))
                times = {percent: 1000 * float(seconds) for percent, seconds in _LATENCY.findall(said)}
                if set(times) != {"50", "90", "99"}:
                    raise BundleError(f"{TOOL} printed no latencies: {' '.join(said.split())[-200:]!r}", where="phone")
                found.append(PhoneCell(length, batch, count, times["50"], times["90"], times["99"]))
                stage.advance()
        finally:
            subprocess.run(adb.shell(["rm", "-rf", PLACE]), capture_output=True, check=False)
    return found


def write_inputs(bundle: Path, model: Path, folder: Path, *, length: int, batch: int) -> None:
    """Fills `test_data_set_0` of `folder` with (batch, length) int64 tensors: the golden texts' tokens, end to end."""
    try:
        from onnx import load, numpy_helper
    except ModuleNotFoundError as error:
        raise needs_extra("train", error.name or "onnx") from error
    inputs = [value.name for value in load(model).graph.input]
    if other := [name for name in inputs if name not in TOKENS]:
        what = f"its graph reads {', '.join(other)}, and tokens alone can be fed on a phone"
        raise BundleError(what, where=str(bundle), fix=_HERE)
    tokens = [token for line in json_lines(bundle / "golden.jsonl") for token in line["ids"]]
    if not tokens:
        raise BundleError("its golden texts have no tokens", where=str(bundle), fix="Export the bundle again.")
    ids, mask = np.resize(np.array(tokens, np.int64), (batch, length)), np.ones((batch, length), np.int64)
    values = dict(zip(TOKENS, (ids, mask, np.zeros_like(mask)), strict=True))
    target = folder / "test_data_set_0"
    target.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(inputs):
        tensor = numpy_helper.from_array(values[name], name)
        (target / f"input_{number}.pb").write_bytes(tensor.SerializeToString())


def _model_of(bundle: Path) -> Path:
    """The one file that is timed."""
    model = bundle / "onnx" / "model_quantized.onnx"
    files = files_of(model)
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise BundleError(f"it is in {names}, and one file can be timed on a phone", where=str(bundle), fix=_HERE)
    if not model.is_file():
        raise BundleError("is not there", where=str(model), fix="Give the folder of a bundle.")
    return model


def _check_connected(adb: Adb) -> None:
    try:
        listed = _run(adb.devices()).splitlines()[1:]
    except FileNotFoundError:
        raise MissingExtraError(
            "this needs adb, which is not installed", fix="Install Android's platform tools."
        ) from None
    names = [line.split()[0] for line in listed if line.split()[1:2] == ["device"]]
    if not names or (adb.serial and adb.serial not in names):
        raise MissingExtraError(
            f"adb sees {', '.join(names) or 'no phone'}",
            fix="Connect one, allow USB debugging, and look at `adb devices`.",
        )
    if len(names) > 1 and not adb.serial:
        raise MissingExtraError(f"adb sees {', '.join(names)}", fix="Name one with --device.")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise BundleError(f"`{shlex.join(command)[:160]}` failed ({said})", where="phone")
    return done.stdout
