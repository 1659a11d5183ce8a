"""What a person gets from `pip install distill` alone: the wheel, its base packages, nothing of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ("torch", "transformers", "datasets", "onnx", "onnx_ir", "onnxscript", "sklearn", "jinja2", "pyarrow")

pytestmark = pytest.mark.slow


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=folder, env=environment, timeout=600
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    reachable = run(*pip, "download", "hatchling", "--no-deps", "--retries", "0", "--timeout", "10", "-d", folder / "x")
    if reachable.returncode:
        pytest.skip(f"pip reaches no package index: {reachable.stderr.strip().splitlines()[-1]}")
    built = run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("distill-*.whl"))


@pytest.fixture(scope="module")
def distill(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in a fresh environment, far from the source tree."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    for command in (
        (sys.executable, "-m", "venv", folder),
        (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    return folder / "bin" / "distill"


def test_the_wheel_holds_the_package_and_its_cards(wheel: Path) -> None:
    """Tests or benchmarks at the top of site-packages would shadow other people's."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"distill"}
    for room in ("teachers", "students"):
        cards = {path.name for path in (ROOT / room).glob("*.toml")}
        assert cards
        assert {name.rsplit("/", 1)[1] for name in names if name.startswith(f"distill/_cards/{room}/")} >= cards
    assert {"distill/py.typed", "distill/report/templates/report.html.j2"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".onnx", ".safetensors"))]


def test_training_packages_are_not_brought_along(distill: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {TRAINING} if u.find_spec(name)])"
    assert run(distill.with_name("python"), "-c", code).stdout.strip() == "[]"


def test_version_and_help(distill: Path) -> None:
    assert run(distill, "--version").stdout == "distill 0.1.0\n"
    assert "predict" in run(distill, "--help").stdout


def test_predict(distill: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(
        distill, "predict", tiny_bundle, "where is my new card", "how i reset my password", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == ["where is my new card", "how i reset my password"]
    assert {answer["label"] for answer in answers} <= {"arrival", "exchange", "password"}


def test_verify(distill: Path, tiny_bundle: Path, own_bundle: Path) -> None:
    done = run(distill, "verify", tiny_bundle, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    (own_bundle / "config.json").write_text("{}")
    done = run(distill, "verify", own_bundle)
    assert done.returncode == 12
    assert "config.json has changed since it was shipped" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_bench(distill: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(distill, "bench", tiny_bundle, "--lengths", "8", "--runs", "5", "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["cells"][0]["p50"] > 0
    assert "torch" not in report["versions"]


def test_cards_are_found_outside_the_source_tree(distill: Path, tmp_path: Path) -> None:
    done = run(distill, "student", "list", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layers-4" in done.stdout


@pytest.mark.parametrize("command", ["compress", "finetune", "train", "export"])
def test_training_says_what_to_install(command: str, distill: Path, tmp_path: Path) -> None:
    made = run(distill, "new", "x.toml", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    done = run(distill, command, "x.toml", folder=tmp_path)
    assert done.returncode == 2
    assert 'pip install "distill[train]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.toml"]  # nothing half-written


def test_a_checkpoint_cannot_be_measured_without_torch(distill: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    done = run(distill, "bench", tmp_path)
    assert done.returncode == 2
    assert 'pip install "distill[train]"' in done.stderr


def test_the_runtime_alone(distill: Path, tiny_bundle: Path) -> None:
    code = "import sys; from distill import Bundle; print(Bundle.load(sys.argv[1])('where is my card').label)"
    done = run(distill.with_name("python"), "-c", code, tiny_bundle)
    assert done.stdout.strip() in ("arrival", "exchange", "password"), done.stderr
