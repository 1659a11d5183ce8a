"""The command line: parses, calls, prints. Everything it does is one call in Python.

Only the light packages are imported here; what a command needs beyond them is imported when it runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from distill import __version__
from distill.errors import DistillError, needs_extra

app = typer.Typer(
    name="distill",
    help="Compress a fine-tuned Transformer into a small, verified int8 ONNX bundle.",
    epilog="Begin with `distill demo`, or with `distill new recipe.toml`. Add --debug to any command for a traceback.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
student_app = typer.Typer(
    help="Student cards: which there are, and what each makes of a teacher.", no_args_is_help=True
)
app.add_typer(student_app, name="student")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe; `distill new` writes one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set training.epochs=3")
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Redo what differs, though the output folder holds another recipe's work.")
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one value a line.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of ONNX Runtime.")]


STOPPED = 130
"""The exit code behind Ctrl-C."""

LASTING = ("compress", "demo", "evaluate", "export", "finetune", "label", "report", "train")
"""Commands whose work is kept as it is done."""


def main() -> None:
    """Runs a command; a problem is one line on standard error and an exit code that is not 0."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="distill")
    except DistillError as error:
        if debug:
            raise
        _complain(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if debug:
            raise
        missing = needs_extra("train", error.name or "a package")
        _complain(str(missing))
        sys.exit(missing.exit_code)
    except SystemExit as stop:
        if stop.code == STOPPED:
            goes_on = " The same command goes on where it was." if set(arguments[:1]) & set(LASTING) else ""
            _complain(f"stopped.{goes_on}")
        raise
    except Exception as error:
        if debug:
            raise
        _complain(
            f"{type(error).__name__}: {' '.join(str(error).split())[:500]} (run it again with --debug to see where)"
        )
        sys.exit(1)


def _complain(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@contextmanager
def _display() -> Iterator[Any]:
    from rich.console import Console

    from distill.display import Display

    with Display(Console(stderr=True)) as display:
        yield display


@app.command()
def new(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The file to write.")],
    teacher: Annotated[str, typer.Option(help="Fine-tuned model: a hub id or a folder.")] = "path-or-hub-id",
    train: Annotated[str, typer.Option(help="Training data: a file or a hub id.")] = "train.csv",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented recipe."""
    from distill.errors import OutputError
    from distill.files import write_text
    from distill.recipe import Recipe

    if recipe.exists() and not force:
        raise OutputError("is there already", where=str(recipe), fix="Choose another name, or give --force.")
    values = {"name": recipe.stem, "teacher": {"checkpoint": teacher}, "data": {"train": train}}
    write_text(recipe, Recipe.parse(values).to_toml(comments=True))
    typer.echo(f"Wrote {recipe}. Set teacher.checkpoint and [data], then: distill compress {recipe}")


def _pipeline_command(stage: str, help_text: str) -> None:
    """Adds the command that runs a recipe up to `stage`; all of them share one shape."""

    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        output: Annotated[str, typer.Option(help="Output folder; overrides the recipe's.")] = "",
        replace: Replace = False,
    ) -> None:
        from distill.recipe import Recipe

        loaded = Recipe.load(recipe, overrides or [])
        if output:
            loaded = loaded.model_copy(update={"output": output})
        pipeline = _train_module("distill.pipeline")
        with _display() as display:
            result = pipeline.run_stages(loaded, until=stage, progress=display, replace=replace)
        for line in result.summary():
            typer.echo(line)

    app.command(name=stage, help=help_text)(command)


def _train_module(name: str) -> Any:
    """Imports a module that needs the `train` extra."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "distill":
            raise
        raise needs_extra("train", error.name or "torch") from error


_pipeline_command("compress", "Everything: teacher, cache, student, ONNX, int8, proof, bundle, bench, report.")
_pipeline_command("finetune", "Make a teacher from the pretrained model `teacher.start`.")
_pipeline_command("label", "Up to the teacher cache: soft labels and hidden states, once.")
_pipeline_command("train", "Up to the trained student and its baseline without a teacher.")
_pipeline_command("evaluate", "Up to teacher, student and baseline measured on the test data.")
_pipeline_command("export", "Up to the verified int8 bundle.")
_pipeline_command("report", "Up to the report: what `compress` does, by another name for a finished run.")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demonstration's data and results go.")] = Path("runs/demo"),
    overrides: Overrides = None,
    replace: Replace = False,
) -> None:
    """Compress a real model on real data: movie-review sentences, all-MiniLM-L6-v2, no account needed."""
    from distill.recipe import Recipe

    module = _train_module("distill.demo")
    pipeline = _train_module("distill.pipeline")
    with _display() as display:
        path = module.prepare_demo(folder, progress=display)
        recipe = Recipe.load(path, overrides or [])
        result = pipeline.run_stages(recipe, until="compress", progress=display, replace=replace)
    for line in result.summary():
        typer.echo(line)


@app.command()
def bench(
    targets: Annotated[list[Path], typer.Argument(help="ONNX files, bundles, PyTorch checkpoint folders.")],
    lengths: Annotated[str, typer.Option(help="Sequence lengths in tokens.")] = "16,32,64,128",
    batches: Annotated[str, typer.Option(help="Sentences a call.")] = "1",
    threads: Annotated[str, typer.Option(help="Threads a session.")] = "1",
    runs: Annotated[int, typer.Option(min=3, help="Timed calls a cell.")] = 100,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write every number here.")] = None,
    adb: Annotated[
        Path | None,
        typer.Option(metavar="PERF_TEST", help="Measure a bundle on a phone, with this onnxruntime_perf_test."),
    ] = None,
    device: Annotated[str, typer.Option(help="With --adb: the phone's serial, where several are connected.")] = "",
) -> None:
    """Measure latency, throughput, load time, memory and size side by side, interleaved, in one run."""
    from distill.bench import bench as measure
    from distill.files import write_json

    if device and adb is None:
        raise typer.BadParameter("--device is of a phone: give --adb PERF_TEST with it")
    if adb is not None:
        _bench_phone(targets, adb, device, _numbers(lengths), _numbers(batches), _numbers(threads), runs, out)
        return
    with _display() as display:
        report = measure(
            targets,
            lengths=_numbers(lengths),
            batches=_numbers(batches),
            threads=_numbers(threads),
            runs=runs,
            progress=display,
        )
    _print_table("", *report.table())
    for note in report.notes():
        typer.echo(note)
    if out:
        write_json(out, report.to_json())


def _bench_phone(
    targets: list[Path],
    perf_test: Path,
    device: str,
    lengths: list[int],
    batches: list[int],
    threads: list[int],
    runs: int,
    out: Path | None,
) -> None:
    from dataclasses import asdict

    from distill.bench.phone import COLUMNS, Adb, bench_phone
    from distill.files import write_json

    if len(targets) != 1:
        raise typer.BadParameter(f"{len(targets)} targets: --adb measures one bundle")
    with _display() as display:
        cells = bench_phone(
            targets[0],
            perf_test,
            adb=Adb(serial=device),
            lengths=lengths,
            batches=batches,
            threads=threads,
            runs=runs,
            progress=display,
        )
    _print_table("", COLUMNS, [cell.row() for cell in cells])
    if out:
        write_json(out, {"cells": [asdict(cell) for cell in cells]})


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise typer.BadParameter(f"{text!r} must be positive whole numbers with commas between, such as 16,32")
    return values


@app.command()
def predict(
    bundle: BundlePath,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; standard input, a text a line, when none.")] = None,
    pair: Annotated[list[str] | None, typer.Option(help="Second sentence, once for each text.")] = None,
    as_json: AsJson = False,
    threads: Threads = 1,
    file: Annotated[str, typer.Option(help="ONNX file of the bundle; the int8 one when empty.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens that a language model writes; the bundle's own when empty.")
    ] = None,
) -> None:
    """Ask the shipped file. Needs the base install alone."""
    from distill.export.runtime import Bundle

    loaded = Bundle.load(bundle, file=file or None, threads=threads)
    if pair and len(pair) != len(texts or []):
        raise typer.BadParameter(f"{len(texts or [])} texts and {len(pair)} --pair: give one for each text")
    if max_new_tokens is not None and not loaded.model.writes:
        raise typer.BadParameter(f"--max-new-tokens: a bundle for {loaded.task} writes no text")
    given: Any = list(zip(texts, pair, strict=True)) if texts and pair else texts
    lines = given if given else _typed()
    for text, prediction in zip(*_twice(lines, loaded, max_new_tokens), strict=False):
        if as_json:
            typer.echo(json.dumps({"text": text, **prediction.to_json()}, ensure_ascii=False))
        else:
            shown = " ".join((text if isinstance(text, str) else " | ".join(text)).split())
            typer.echo(f"{prediction.summary()}\t{shown}")
    if loaded.cut:
        lost = f"longer than {loaded.max_length} tokens and lost their {loaded.lost}"
        typer.echo(f"{loaded.cut:,} texts are {lost}", err=True)


def _typed() -> Iterator[str]:
    """Lines of standard input, in UTF-8 whatever the locale."""
    from distill.files import utf8_lines

    return (line.rstrip("\r\n") for line in utf8_lines(sys.stdin.buffer, "standard input"))


def _twice(lines: Any, loaded: Any, new_tokens: int | None) -> tuple[Iterator[Any], Iterator[Any]]:
    """Each text beside its prediction, streamed."""
    from itertools import tee

    shown, asked = tee(lines)
    return shown, loaded.stream(asked, new_tokens=new_tokens)


@app.command()
def verify(
    bundle: BundlePath,
    as_json: AsJson = False,
    data: Annotated[str, typer.Option(help="Labelled data: also measure the task's metric (train extra).")] = "",
) -> None:
    """Check checksums, labels, tokenizer and golden vectors on whatever machine this now is."""
    from distill.export.verify import verify_bundle

    verdict = verify_bundle(bundle)
    if data and verdict.ok:
        shipping = _train_module("distill.shipping")
        verdict = shipping.verify_with_data(bundle, data, verdict)
    if as_json:
        typer.echo(json.dumps(verdict.to_json(), ensure_ascii=False))
    else:
        _print_table("", ["check", "verdict", "detail"], verdict.rows())
    if not verdict.ok:
        raise verdict.error()


@app.command("export-text")
def export_text(bundle: BundlePath) -> None:
    """Add onnx/model_text.onnx to a bundle, which takes texts: its tokenizer is in the graph."""
    module = _train_module("distill.export.text")
    with _display() as display:
        path = module.export_text(bundle, progress=display)
    typer.echo(f"Wrote {path}: the same tokens for {module.STRINGS:,} odd texts and the golden ones.")


@app.command("demo-page")
def demo_page(
    bundle: BundlePath,
    folder: Annotated[
        Path | None, typer.Argument(help="Where the page goes; BUNDLE-page beside it when empty.")
    ] = None,
    modules: Annotated[
        Path | None, typer.Option(help="A node_modules with its two packages; npm installs them when empty.")
    ] = None,
) -> None:
    """Write a folder with one static page that runs a bundle in the browser and measures it there."""
    from distill.export.demo_page import write_demo_page

    place = folder or bundle.resolve().with_name(f"{bundle.resolve().name}-page")
    with _display() as display:
        page = write_demo_page(bundle, place, modules=modules, progress=display)
    typer.echo(f"Wrote {page}. Show it: python -m http.server -d {page.parent}")


@app.command()
def push(
    bundle: BundlePath,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and list, and reach no network.")] = False,
) -> None:
    """Verify a bundle and upload it to the Hugging Face hub, its model card included."""
    shipping = _train_module("distill.export.push")
    with _display() as display:
        shipment = shipping.push_bundle(bundle, repo, private=private, dry_run=dry_run, progress=display)
    _print_table("", ["file", "bytes"], shipment.rows())
    typer.echo(f"Nothing was uploaded: without --dry-run this goes to {repo}" if dry_run else f"See {shipment.url}")


@student_app.command("list")
def student_list() -> None:
    """Name the student cards."""
    from distill.cards import list_cards, load_student_card

    _print_table(
        "", ["card", "what it is"], [[name, load_student_card(name).description] for name in list_cards("student")]
    )


@student_app.command("show")
def student_show(
    card: Annotated[str, typer.Argument(help="Card by name or path.")],
    teacher: Annotated[str, typer.Option(help="Hub id or folder of the teacher.")],
) -> None:
    """Print layer map, exact parameters and int8 bytes of a card's student of a teacher."""
    from distill.cards import load_student_card

    student, loader = _train_module("distill.student.build"), _train_module("distill.teacher")
    plan = student.plan_student(loader.load_config(teacher), load_student_card(card))
    _print_table(f"{card} of {teacher}", list(student.TABLE_COLUMNS), plan.rows())


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console

    from distill.display import print_table

    print_table(Console(), title, columns, rows)


if __name__ == "__main__":
    main()
