// Asks a bundle through transformers.js, as an app would: JSON lines in, JSON lines out.
//   node node.mjs FOLDER/BUNDLE predict < texts.jsonl     {"label", "score", "all": {label: score}} a line
//   node node.mjs FOLDER/BUNDLE encode  < texts.jsonl     [id, ...] a line
//   node node.mjs FOLDER/BUNDLE tag     < texts.jsonl     [{"entity", "score", ...}, one a token] a line
//   node node.mjs FOLDER/BUNDLE write   < texts.jsonl     the eight tokens behind the text, as text, a line
//   node node.mjs FOLDER/BUNDLE rewrite < texts.jsonl     eight tokens that an encoder-decoder makes of it, a line
// A text is a JSON string, or a list of two for a pair.
import path from "node:path";
import readline from "node:readline";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The packages lie in a cache folder, not beside this file.
const from = createRequire(path.join(process.env.CLIENTS, "package.json"));
const { AutoTokenizer, env, pipeline } = await import(pathToFileURL(from.resolve("@huggingface/transformers")));

const folder = path.resolve(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
env.useFSCache = false;
const name = path.basename(folder);

const texts = [];
for await (const line of readline.createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  texts.push(JSON.parse(line));
}

if (process.argv[3] === "encode") {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  for (const text of texts) {
    const [first, second] = Array.isArray(text) ? text : [text, undefined];
    const { input_ids } = tokenizer(first, { text_pair: second, truncation: true, return_tensor: false });
    process.stdout.write(JSON.stringify(Array.isArray(input_ids[0]) ? input_ids[0] : input_ids) + "\n");
  }
} else if (process.argv[3] === "write") {
  const write = await pipeline("text-generation", name, { dtype: "q8" });
  for (const text of texts) {
    const [{ generated_text: found }] = await write(text, {
      max_new_tokens: 8,
      do_sample: false,
      return_full_text: false,
    });
    process.stdout.write(JSON.stringify(found) + "\n");
  }
} else if (process.argv[3] === "rewrite") {
  const rewrite = await pipeline("text2text-generation", name, { dtype: "q8" });
  for (const text of texts) {
    const [{ generated_text: found }] = await rewrite(text, { max_new_tokens: 8 });
    process.stdout.write(JSON.stringify(found) + "\n");
  }
} else if (process.argv[3] === "tag") {
  const tag = await pipeline("token-classification", name, { dtype: "q8" });
  for (const text of texts) process.stdout.write(JSON.stringify(await tag(text, { ignore_labels: [] })) + "\n");
} else {
  const classify = await pipeline("text-classification", name, { dtype: "q8" });
  for (const text of texts) {
    const scores = await classify(text, { top_k: null });
    const all = Object.fromEntries(scores.map(({ label, score }) => [label, score]));
    process.stdout.write(JSON.stringify({ label: scores[0].label, score: scores[0].score, all }) + "\n");
  }
}
