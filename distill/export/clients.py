"""Code that calls a bundle from an app, for its README: with the bundle's own inputs, outputs, labels and length.

Python and JavaScript are run by our tests. The toolchains of Kotlin, Swift and C++ are not at hand: tests hold them
to the graph's names, and C++ to the declarations of the calls it makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distill.export.sessions import PRECISE

WORDS = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types"}
"""Inputs of the graph to variables of the code."""


@dataclass(frozen=True)
class Facts:
    """What the code depends on.

    Attributes:
        labels: In the order of the columns of `probabilities`.
        max_length: Tokens at most.
        inputs: Names that the graph is fed, int64 (batch, length).
        pairs: It was taught with two texts.
        code: Python that asks it, where its answer is not one label.
        pipeline: The name of its pipeline in transformers.js.
        precise: Its int8 weights go to -127 and 127, so that x86 without VNNI needs the session option `PRECISE`.
        side: Where texts are cut that are too long: `right` or `left`.
    """

    labels: Sequence[str]
    max_length: int
    inputs: Sequence[str]
    pairs: bool
    code: str | None = None
    pipeline: str = "text-classification"
    precise: bool = False
    side: str = "right"


def python(facts: Facts) -> str:
    """For servers and desktops: the base install, no torch."""
    asked = '"a text", "a second text"' if facts.pairs else '"a text"'
    code = (facts.code or "print(bundle({asked}).label)").replace("{asked}", asked)
    return f"""
from distill import Bundle

bundle = Bundle.load("PATH/TO/THIS/FOLDER")
{code}
"""


def javascript(facts: Facts) -> str:
    """For Node and browsers: transformers.js, whose pipeline takes single texts alone."""
    if facts.pipeline == "zero-shot-image-classification":
        return _javascript_towers(facts)
    if facts.pipeline == "image-to-text":
        facts = replace(facts, pairs=False)  # a caption may be given, and need not
    start = """
env.allowRemoteModels = false;
env.localModelPath = "PATH/TO/THE/PARENT/OF/THIS/FOLDER";
"""
    start, settings = start + _javascript_options(facts), _javascript_settings(facts)
    if not facts.pairs:
        verb = "describe" if facts.pipeline == "image-to-text" else "classify"
        given = "an-image.png" if facts.pipeline.startswith("image-") else "a text"
        return f"""
import {{ env, pipeline }} from "@huggingface/transformers";
{start}const {verb} = await pipeline("{facts.pipeline}", "THIS-FOLDER", {settings});
console.log(await {verb}("{given}"));
"""
    return f"""
import {{ AutoModelForSequenceClassification, AutoTokenizer, env, softmax }} from "@huggingface/transformers";
{start}const tokenizer = await AutoTokenizer.from_pretrained("THIS-FOLDER");
const model = await AutoModelForSequenceClassification.from_pretrained("THIS-FOLDER", {settings});
const {{ logits }} = await model(tokenizer("a text", {{ text_pair: "a second text", truncation: true }}));
const scores = softmax(logits.tolist()[0]);
const best = scores.indexOf(Math.max(...scores));
console.log({{ label: model.config.id2label[best], score: scores[best] }});
"""


def _javascript_towers(facts: Facts) -> str:
    """Two encoders are loaded by themselves: an app that searches needs one of them at a time."""
    settings = _javascript_settings(facts)
    return f"""
import {{
  AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env,
}} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "PATH/TO/THE/PARENT/OF/THIS/FOLDER";
{_javascript_options(facts)}const tokenizer = await AutoTokenizer.from_pretrained("THIS-FOLDER");
const processor = await AutoProcessor.from_pretrained("THIS-FOLDER");
const texts = await CLIPTextModelWithProjection.from_pretrained("THIS-FOLDER", {settings});
const images = await CLIPVisionModelWithProjection.from_pretrained("THIS-FOLDER", {settings});
const {{ text_embeds }} = await texts(tokenizer("a text", {{ padding: true, truncation: true }}));
const {{ image_embeds }} = await images(await processor(await RawImage.read("an-image.png")));
const [text, image] = [text_embeds.tolist()[0], image_embeds.tolist()[0]];
console.log({{ similarity: text.reduce((sum, value, place) => sum + value * image[place], 0) }});
"""


def _javascript_options(facts: Facts) -> str:
    """The line before a model is loaded."""
    section, key = PRECISE.split(".")
    said = f'{{ extra: {{ {section}: {{ {key}: "1" }} }} }}'
    why = "exact int8 sums on x86 without VNNI; slow with AMX"
    return f"const session_options = {said}; // {why}\n" if facts.precise else ""


def _javascript_settings(facts: Facts) -> str:
    return '{ dtype: "q8", session_options }' if facts.precise else '{ dtype: "q8" }'


def kotlin(facts: Facts) -> str:
    """For Android: ONNX Runtime's Java API, DJL's tokenizers, labels from the graph's metadata."""
    sources = {"input_ids": "ids", "attention_mask": "attentionMask", "token_type_ids": "typeIds"}
    fed = "".join(f'\n            "{name}" to tokens.{sources[name]},' for name in facts.inputs)
    second = ", second: String" if facts.pairs else ""
    threads = "setIntraOpNumThreads(1)"
    options = f"{{ {threads} }}"
    if facts.precise:
        options = f"""{{
            {threads}
            addConfigEntry("{PRECISE}", "1") // exact int8 sums on x86 without VNNI
        }}"""
    return f"""
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.LongBuffer
import java.nio.file.Path
import org.json.JSONArray

class Classifier(folder: Path) : AutoCloseable {{
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(
        folder.resolve("onnx/model_quantized.onnx").toString(),
        OrtSession.SessionOptions().apply {options},
    )
    private val tokenizer = HuggingFaceTokenizer.builder()
        .optTokenizerPath(folder).optMaxLength({facts.max_length}).optTruncation(true).optPadding(false).build()
    private val labels = JSONArray(session.metadata.customMetadata["distill.labels"])

    fun probabilities(text: String{second}): Map<String, Float> {{
        val tokens = tokenizer.encode(text{", second" if facts.pairs else ""})
        val shape = longArrayOf(1, tokens.ids.size.toLong())
        val inputs = mapOf({fed}
        ).mapValues {{ OnnxTensor.createTensor(environment, LongBuffer.wrap(it.value), shape) }}
        try {{
            session.run(inputs, setOf("probabilities")).use {{ found ->
                @Suppress("UNCHECKED_CAST")
                val row = (found["probabilities"].get().value as Array<FloatArray>)[0]
                return row.indices.associate {{ labels.getString(it) to row[it] }}
            }}
        }} finally {{
            inputs.values.forEach(OnnxTensor::close)
        }}
    }}

    override fun close() {{ session.close(); tokenizer.close() }}
}}
"""


def swift(facts: Facts) -> str:
    """For iOS and macOS: ONNX Runtime's Swift package, swift-transformers' tokenizers (single texts alone)."""
    sources = {"input_ids": "ids", "attention_mask": "ids.map { _ in 1 }", "token_type_ids": "ids.map { _ in 0 }"}
    fed = "".join(f'\n            "{name}": try tensor({sources[name]}),' for name in facts.inputs)
    precise = f"""
        try options.addConfigEntry(withKey: "{PRECISE}", value: "1") // exact int8 sums on x86 without VNNI"""
    kept = f"ids.prefix({facts.max_length - 1}) + [ids[ids.count - 1]]"
    if facts.side == "left":
        kept = f"[ids[0]] + ids.suffix({facts.max_length - 1})"
    return f"""
import Foundation
import OnnxRuntimeBindings
import Tokenizers

final class Classifier {{
    private let environment: ORTEnv
    private let session: ORTSession
    private let tokenizer: any Tokenizer
    private let labels: [String]

    init(folder: URL) async throws {{
        environment = try ORTEnv(loggingLevel: .warning)
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(1){precise if facts.precise else ""}
        let file = folder.appendingPathComponent("onnx/model_quantized.onnx").path
        session = try ORTSession(env: environment, modelPath: file, sessionOptions: options)
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
        struct Config: Decodable {{ let id2label: [String: String] }}
        let data = try Data(contentsOf: folder.appendingPathComponent("config.json"))
        let names = try JSONDecoder().decode(Config.self, from: data).id2label
        labels = (0..<names.count).compactMap {{ names[String($0)] }}
    }}

    func probabilities(of text: String) throws -> [String: Float] {{
        var ids = tokenizer.encode(text: text).map(Int64.init)
        if ids.count > {facts.max_length} {{ ids = {kept} }}
        func tensor(_ values: [Int64]) throws -> ORTValue {{
            let data = values.withUnsafeBytes {{ NSMutableData(bytes: $0.baseAddress, length: $0.count) }}
            return try ORTValue(tensorData: data, elementType: .int64, shape: [1, NSNumber(value: values.count)])
        }}
        let inputs = [{fed}
        ]
        let found = try session.run(withInputs: inputs, outputNames: ["probabilities"], runOptions: nil)
        let row = try found["probabilities"]!.tensorData() as Data
        let values = row.withUnsafeBytes {{ Array($0.bindMemory(to: Float.self)) }}
        return Dictionary(uniqueKeysWithValues: zip(labels, values))
    }}
}}
"""


def cpp(facts: Facts) -> str:
    """For everything else: ids in, probabilities out; any reader of `tokenizer.json` makes the ids."""
    names = ", ".join(f'"{name}"' for name in facts.inputs)
    fed = ", ".join(f"Tensor({WORDS[name]})" for name in facts.inputs)
    labels = ",\n    ".join(_cpp_string(label) for label in facts.labels)
    types = ", std::vector<int64_t> types" if facts.pairs and "token_type_ids" in facts.inputs else ""
    precise = f"""
    options.AddConfigEntry("{PRECISE}", "1");  // exact int8 sums on x86 without VNNI; slow with AMX"""
    zeros = ", types(ids.size(), 0)" if "token_type_ids" in facts.inputs and not types else ""
    return f"""
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

const std::vector<std::string> kLabels = {{
    {labels},
}};

class Classifier {{
 public:
  explicit Classifier(const std::basic_string<ORTCHAR_T>& file) : session_(environment_, file.c_str(), Options()) {{}}

  // ids of one text, special tokens included, at most {facts.max_length}: as golden.jsonl has them
  std::vector<float> Probabilities(std::vector<int64_t> ids{types}) {{
    std::vector<int64_t> mask(ids.size(), 1){zeros};
    const char* const inputs[] = {{{names}}};
    const char* const outputs[] = {{"probabilities"}};
    std::array<Ort::Value, {len(facts.inputs)}> values{{{fed}}};
    auto found = session_.Run(Ort::RunOptions{{nullptr}}, inputs, values.data(), values.size(), outputs, 1);
    const float* row = found[0].GetTensorData<float>();
    return {{row, row + kLabels.size()}};
  }}

 private:
  static Ort::SessionOptions Options() {{
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);{precise if facts.precise else ""}
    return options;
  }}

  static Ort::Value Tensor(std::vector<int64_t>& values) {{
    const std::array<int64_t, 2> shape{{1, static_cast<int64_t>(values.size())}};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), shape.data(), shape.size());
  }}

  Ort::Env environment_{{ORT_LOGGING_LEVEL_WARNING, "distill"}};
  Ort::Session session_;
}};
"""


@dataclass(frozen=True)
class Client:
    """One language of the README.

    Attributes:
        title: Its heading.
        fence: What the code block is called.
        setup: What it stands on, in Markdown.
        code: Makes the code.
    """

    title: str
    fence: str
    setup: str
    code: Callable[[Facts], str]


CLIENTS = (
    Client("Python", "python", "`pip install distill`; no torch.", python),
    Client(
        "JavaScript",
        "javascript",
        "Node and browsers: `npm install @huggingface/transformers`.",
        javascript,
    ),
    Client(
        "Kotlin",
        "kotlin",
        "Android: `com.microsoft.onnxruntime:onnxruntime-android`, `ai.djl.huggingface:tokenizers` with\n"
        "`ai.djl.android:tokenizer-native`, and this folder copied out of the app's assets.",
        kotlin,
    ),
    Client(
        "Swift",
        "swift",
        "iOS and macOS: the packages `microsoft/onnxruntime-swift-package-manager` and\n"
        "`huggingface/swift-transformers`.",
        swift,
    ),
    Client("C++", "cpp", "ONNX Runtime's C++ API, version 1.23 or newer.", cpp),
)


def usage(facts: Facts, languages: Sequence[str] = ("Python", "JavaScript", "Kotlin", "Swift", "C++")) -> str:
    """Markdown: a heading, what it needs and the code, for each of the languages."""
    parts = []
    for client in (client for client in CLIENTS if client.title in languages):
        block = "\n".join(("```" + client.fence, client.code(facts).strip("\n"), "```"))
        page = client.title == "JavaScript" and facts.pipeline == "text-classification"
        setup = client.setup + " `distill demo-page` makes a whole page." * page
        parts.append(f"### {client.title}\n\n{setup}\n\n{block}")
        if client.title == "JavaScript" and facts.pipeline == "text-classification":
            parts.append(
                f"transformers.js 4 cuts a text of more than {facts.max_length} tokens together with its closing "
                "special token: shorten\nlong texts before you ask it."
            )
        if client.title == "Swift" and facts.pairs:
            parts.append("swift-transformers takes no pairs: join the ids of the two texts as golden.jsonl has them.")
    return "\n\n".join(parts)


def as_json(labels: Sequence[str]) -> str:
    """JSON that neither ends a code block nor holds a tag; parsed, it is the labels."""
    text = json.dumps(labels, ensure_ascii=False)
    return re.sub(r"[&<>`\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _cpp_string(text: str) -> str:
    """A literal of ASCII: UTF-8 bytes that C++, Markdown or HTML could trip over are octal, always three digits."""
    plain = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:_-+=/(){}!#%*@^~|'$")
    body = "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode("utf-8", "replace"))
    return f'"{body}"'
