// The page: loads the fused folder that serve.py has below /model/, and chats.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";
import { Fused, Text } from "./fused.mjs";

const LIMIT = Number(new URLSearchParams(location.search).get("tokens") ?? 200); // of an answer
const NAMES = { full: "full precision", int8: "INT8", int4: "INT4", int2: "INT2", skip: "skipped" };

const at = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(share * 100)} %`;

function add(parent, tag, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

/** Reads a file below /model/, telling how far it is. */
async function fetched(name, progress = () => {}) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(Number(response.headers.get("content-length")));
  let have = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return bytes;
    bytes.set(value, have);
    progress((have += value.length), bytes.length);
  }
}

const read = async (name) => new TextDecoder().decode(await fetched(name));

async function load(note) {
  ort.env.wasm.proxy = true; // in a worker: the page stays awake
  const facts = JSON.parse(await read("dash_fused.json"));
  const text = await Text.open({ Tokenizer, Template }, read);
  const bar = add(note, "progress");
  const data = await fetched("model.onnx.data", (have, all) => {
    Object.assign(bar, { value: have, max: all });
    note.firstChild.data = `${facts.model}: ${Math.round(have / 1e6)} of ${Math.round(all / 1e6)} MB`;
  });
  bar.removeAttribute("value");
  note.firstChild.data = `${facts.model}: preparing`;
  const session = await ort.InferenceSession.create(await fetched("model.onnx"), {
    externalData: [{ path: "model.onnx.data", data }],
    logSeverityLevel: 3,
    extra: { session: { disable_quant_qdq: "1" } }, // widens the weights now, not for every token
  });
  return { facts, text, model: new Fused(ort, session, facts) };
}

/** Slider and presets; returns a function that gives the chosen budget. */
function control({ budgets }) {
  if (!budgets) return () => undefined;
  const slider = at("budget");
  const buttons = Object.entries(budgets.presets)
    .sort(([, a], [, b]) => a - b)
    .map(([name, value]) => {
      const choose = () => show((slider.value = value));
      const button = add(at("presets"), "button", { type: "button", textContent: name });
      button.onclick = choose;
      return [button, value];
    });
  const show = () => {
    at("percent").textContent = `${(slider.value * 100).toFixed(1)} %`;
    for (const [button, value] of buttons) {
      button.ariaPressed = Math.abs(slider.value - value) < 1e-9;
    }
  };
  // Beyond the dearest preset there is little to see.
  const usual = Math.max(budgets.default, 1.25 * Math.max(...Object.values(budgets.presets)));
  const most = Math.min(budgets.most, usual);
  Object.assign(slider, { min: budgets.least, max: most, oninput: show });
  show((slider.value = budgets.default));
  at("control").hidden = false;
  return () => Number(slider.value);
}

/** The layers of a token from top to bottom. */
function strip(path) {
  const edge = (layer) => `${((100 * layer) / path.length).toFixed(2)}%`;
  const stops = path.map((action, i) => `var(--${action}) ${edge(i)} ${edge(i + 1)}`);
  return `linear-gradient(${stops.join(",")})`;
}

const counts = (paths, actions) =>
  actions.map((action) => [action, paths.flat().filter((one) => one === action).length]);

function show(text, step, parent) {
  // Without a character of its own a strip has nothing to stand under.
  const textContent = text.replaceAll(/\n+/g, "\u21b5") || "\u00b7";
  const place = add(parent, "span", { className: "token", textContent });
  place.classList.toggle("blank", !text.trim());
  place.dataset.text = text;
  const names = counts([step.path], [...new Set(step.path)]);
  place.title = names.map(([action, count]) => `${NAMES[action]} ${count}`).join(", ");
  add(place, "i", { className: "strip" }).style.background = strip(step.path);
  if (text.includes("\n")) add(parent, "span", { className: "break" });
}

function figures(runs, steps) {
  const all = counts(steps.map(({ path }) => path), runs);
  const total = all.reduce((sum, [, count]) => sum + count, 0);
  at("legend").replaceChildren();
  for (const [action, count] of all) {
    const item = add(at("legend"), "li");
    add(item, "i").style.background = `var(--${action})`;
    add(item, "span", { textContent: NAMES[action] });
    add(item, "b", { textContent: total ? percent(count / total) : "" });
  }
  at("figures").replaceChildren();
  if (steps.length < 2) return;
  const [first, ...rest] = steps.map(({ ms }) => ms);
  const mean = rest.reduce((a, b) => a + b) / rest.length;
  const rows = { "first token": `${Math.round(first)} ms`, "tokens/s": (1e3 / mean).toFixed(1) };
  for (const [name, value] of Object.entries(rows)) {
    add(at("figures"), "dt", { textContent: name });
    add(at("figures"), "dd", { textContent: value });
  }
}

async function answer({ facts, text, model }, messages, budget) {
  const turn = add(at("chat"), "div", { className: "turn model" });
  const tokens = add(turn, "div", { className: "tokens" });
  const decode = text.decoder();
  const steps = [];
  let said = "";
  for await (const step of model.generate(text.encode(messages), {
    eos: text.eos,
    limit: LIMIT,
    budget,
  })) {
    steps.push(step);
    const piece = decode(step.token);
    said += piece;
    tokens.style.setProperty("--layers", step.path.length);
    show(piece, step, tokens);
    figures(facts.runs, steps);
    turn.scrollIntoView({ block: "end" });
  }
  messages.push({ role: "assistant", content: said });
}

async function main() {
  const note = add(at("chat"), "div", { className: "note", textContent: "Loading" });
  const loaded = await load(note).catch((error) => {
    note.textContent = `The model could not be loaded. ${error.message}`;
    throw error;
  });
  note.remove();
  const { facts } = loaded;
  at("model").textContent = facts.model;
  const budget = control(facts);
  figures(facts.runs, []);
  const messages = [];
  const [question, send] = [at("question"), at("send")];
  const ready = (yes) => {
    question.disabled = send.disabled = !yes;
    question.placeholder = yes ? "Ask something" : "";
    document.body.dataset.state = yes ? "ready" : "busy";
    if (yes) question.focus();
  };
  at("ask").onsubmit = async (event) => {
    event.preventDefault();
    const content = question.value.trim();
    if (!content) return;
    question.value = "";
    ready(false);
    add(at("chat"), "div", { className: "turn user", textContent: content });
    messages.push({ role: "user", content });
    await answer(loaded, messages, budget).catch((error) => {
      add(at("chat"), "div", { className: "note", textContent: error.message });
      messages.length = 0;
    });
    ready(true);
  };
  ready(true);
}

main();
