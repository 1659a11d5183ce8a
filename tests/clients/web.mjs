// Asks a bundle's graph through onnxruntime-web's WebAssembly, as a browser would: JSON lines in, JSON lines out.
//   node web.mjs FOLDER/BUNDLE < ids.jsonl     [probability, ...] a line
// A line is a list of token ids, special tokens included.
import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

// The packages lie in a cache folder, not beside this file.
const dist = path.join(process.env.CLIENTS, "node_modules", "onnxruntime-web", "dist", path.sep);
const ort = await import(pathToFileURL(path.join(dist, "ort.wasm.min.mjs")));
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = pathToFileURL(dist).href;

const file = fs.readFileSync(path.join(path.resolve(process.argv[2]), "onnx", "model_quantized.onnx"));
const session = await ort.InferenceSession.create(new Uint8Array(file));
for await (const line of readline.createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  const ids = JSON.parse(line);
  const columns = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: ids.map(() => 0) };
  const feeds = {};
  for (const name of session.inputNames) {
    feeds[name] = new ort.Tensor("int64", BigInt64Array.from(columns[name], BigInt), [1, ids.length]);
  }
  const { probabilities } = await session.run(feeds);
  process.stdout.write(JSON.stringify(Array.from(probabilities.data)) + "\n");
}
