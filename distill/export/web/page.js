// Runs a bundle in the browser. What comes from the bundle reaches the page as text, never as HTML.
import * as ort from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const TOLERANCE = 0.05; // of a probability, as `distill verify` allows
const AVERAGE = 0.4; // part of it that the texts may use up on average
const SHOWN = 8; // labels of an answer
const WARM = 10; // calls of a length that are not timed
const RUNS = 31; // calls that are

const at = (id) => document.getElementById(id);
const get = async (path) => {
  const answer = await fetch(`bundle/${path}`);
  if (!answer.ok) throw new Error(`bundle/${path} cannot be read (${answer.status})`);
  return answer;
};

// -- the model ---------------------------------------------------------------------------------------------------

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("vendor/", document.baseURI).href;
const began = performance.now();
let manifest, tokenizer, session;

/** Ids and token types of a text or a pair; past the limit the longer text loses its end, special tokens stay. */
function encode(first, second) {
  const options = { text_pair: second ?? null, return_token_type_ids: true };
  const { ids, token_type_ids: types } = tokenizer.encode(first, options);
  if (ids.length <= manifest.max_length) return { ids, types };
  const texts = second == null ? [first] : [first, second];
  const plain = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids);
  const lengths = plain.map((tokens) => tokens.length);
  const special = ids.length - lengths.reduce((one, other) => one + other);
  const kept = share(lengths, manifest.max_length - special);
  const ahead = ids[0] === plain[0][0] ? 0 : 1; // special tokens before the first text
  const between = special - ahead - 1; // and between two; one closes the last
  const gone = new Set();
  let end = ahead;
  lengths.forEach((length, index) => {
    end += length + (index ? between : 0);
    for (let place = end - length + kept[index]; place < end; place++) gone.add(place);
  });
  const stays = (_, place) => !gone.has(place);
  return { ids: ids.filter(stays), types: types.filter(stays) };
}

/** Tokens that each text keeps of `room`, as tokenizers' LongestFirst has it. */
function share(lengths, room) {
  if (lengths.length === 1) return [room];
  const swapped = lengths[0] > lengths[1];
  let [short, long] = swapped ? [lengths[1], lengths[0]] : lengths;
  long = short > room ? short : Math.max(short, room - short);
  if (short + long > room) [short, long] = [room >> 1, room - (room >> 1)];
  return swapped ? [long, short] : [short, long];
}

/** Probabilities by class, and how long the graph took in milliseconds. */
async function run({ ids, types }) {
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
  const all = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: types ?? ids.map(() => 0) };
  const feeds = Object.fromEntries(session.inputNames.map((name) => [name, tensor(all[name])]));
  const start = performance.now();
  const { probabilities } = await session.run(feeds, ["probabilities"]);
  return { milliseconds: performance.now() - start, values: [...probabilities.data] };
}

async function load() {
  const [told, rules, settings] = await Promise.all(
    ["MANIFEST.json", "tokenizer.json", "tokenizer_config.json"].map(async (path) => (await get(path)).json()),
  );
  manifest = told;
  tokenizer = new Tokenizer(rules, settings);
  const bytes = new Uint8Array(await (await get("onnx/model_quantized.onnx")).arrayBuffer());
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], intraOpNumThreads: 1 });
  await run(encode("warm", manifest.pairs ? "up" : undefined));
  return bytes.length;
}

// -- the page ----------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

async function ask(event) {
  event?.preventDefault();
  const tokens = encode(at("text").value, manifest.pairs ? at("pair").value : undefined);
  const { values, milliseconds } = await run(tokens);
  const order = values.map((_, label) => label).sort((one, other) => values[other] - values[one]);
  at("answer").replaceChildren(
    ...order.slice(0, SHOWN).map((label) => {
      const [row, track, fill] = [element("li", ""), element("span", "track"), element("span", "fill")];
      fill.style.width = `${(100 * values[label]).toFixed(1)}%`;
      track.append(fill);
      const share = element("span", "share", `${(100 * values[label]).toFixed(1)}%`);
      row.append(element("span", "label", manifest.labels[label]), share, track);
      return row;
    }),
  );
  at("status").textContent =
    `${manifest.labels[order[0]]}: ${(100 * values[order[0]]).toFixed(1)}% in ${milliseconds.toFixed(1)} ms, ` +
    `${tokens.ids.length} tokens.`;
}

async function measure() {
  const lengths = [8, 16, 32, 64, 128, 256, 512].filter((length) => length <= manifest.max_length);
  const found = [];
  for (const length of lengths) {
    at("measured").textContent = `Measuring ${length} tokens ...`;
    const ids = Array.from({ length }, (_, place) => 1 + (place % 50));
    const times = [];
    for (let turn = -WARM; turn < RUNS; turn++) {
      const { milliseconds } = await run({ ids });
      if (turn >= 0) times.push(milliseconds);
    }
    found.push([length, times.sort((one, other) => one - other)[RUNS >> 1]]);
    await new Promise((resolve) => setTimeout(resolve));
  }
  at("measured").textContent = found.map(([length, p50]) => `${length} tokens: ${p50.toFixed(1)} ms`).join(", ");
  at("chart").replaceChildren(chart(found));
}

/** Bars of milliseconds by length. The sentence above it says the same, so screen readers skip the picture. */
function chart(found) {
  const make = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const [width, row, left] = [360, 30, 85];
  const most = Math.max(...found.map(([, p50]) => p50));
  const svg = make("svg", { viewBox: `0 0 ${width} ${row * found.length}`, "aria-hidden": "true" });
  found.forEach(([length, p50], index) => {
    const wide = (p50 / most) * (width - left - 75);
    svg.append(
      make("text", { x: left - 10, y: row * index + 20, "text-anchor": "end" }, `${length} tokens`),
      make("rect", { class: "bar", x: left, y: row * index + 6, width: wide, height: row - 12, rx: 3 }),
      make("text", { x: left + wide + 8, y: row * index + 20 }, `${p50.toFixed(1)} ms`),
    );
  });
  return svg;
}

async function check() {
  const lines = (await (await get("golden.jsonl")).text()).split("\n").filter(Boolean).map((line) => JSON.parse(line));
  const best = (values) => values.indexOf(Math.max(...values));
  let [tokens, labels, worst, total] = [0, 0, 0, 0];
  for (const [index, line] of lines.entries()) {
    const made = encode(line.text, line.text_pair);
    if (made.ids.join() === line.ids.join()) tokens++;
    const { values } = await run({ ids: line.ids, types: made.ids.length === line.ids.length ? made.types : undefined });
    if (best(values) === best(line.probabilities)) labels++;
    const moved = Math.max(...values.map((value, label) => Math.abs(value - line.probabilities[label])));
    worst = Math.max(worst, moved);
    total += moved;
    if (index % 20 === 0) at("checked").textContent = `Asked ${index + 1} of ${lines.length} ...`;
  }
  const fine = tokens === lines.length && worst <= TOLERANCE && total <= AVERAGE * TOLERANCE * lines.length;
  at("checked").classList.toggle("wrong", !fine);
  at("checked").textContent =
    `${fine ? "Yes" : "No"}: of ${lines.length} texts ${tokens} have the same tokens and ${labels} the same label; ` +
    `probabilities differ by at most ${worst.toFixed(4)}.`;
}

/** A button that cannot be pressed twice, and whose failure is told. */
function wire(id, event, target, work) {
  at(id).addEventListener(event, async (happened) => {
    happened.preventDefault();
    const button = happened.submitter ?? at(id);
    button.disabled = true;
    try {
      await work();
    } catch (error) {
      at(target).textContent = `It failed: ${error.message}`;
    } finally {
      button.disabled = false;
    }
  });
}

try {
  const bytes = await load();
  document.title = manifest.name;
  at("name").textContent = manifest.name;
  at("about").textContent =
    `${(bytes / 1e6).toFixed(1)} MB, ${manifest.labels.length} labels, at most ${manifest.max_length} tokens; ` +
    `ready in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
  at("second").hidden = !manifest.pairs;
  wire("form", "submit", "status", ask);
  wire("measure", "click", "measured", measure);
  wire("check", "click", "checked", check);
  for (const id of ["text", "pair", "ask", "measure", "check"]) at(id).disabled = false;
} catch (error) {
  at("about").classList.add("wrong");
  at("about").textContent = `The model cannot be loaded: ${error.message}`;
}
