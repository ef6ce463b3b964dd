const $ = (id) => document.getElementById(id);
const NAMES = { F: "full", 8: "int8", 4: "int4", 2: "int2", ".": "skip" };
const SETTINGS = ["system", "temperature", "top_p", "max_tokens"];
const MAX_CHATS = 50; // that the browser keeps
let models = [], running = null, columns = [], moved = false;
let chat = { id: Date.now(), messages: [] };

async function api(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key"); // asked for once, kept for the tab
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    const given = prompt("API key of this server");
    if (given) { sessionStorage.setItem("key", given); return api(path, options); }
  }
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

// What the browser keeps: settings, and chats from the newest to the oldest.
function stored(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
}
function store(name, value) {
  try { localStorage.setItem(name, JSON.stringify(value)); return true; } catch { return false; }
}
function keepChat(chat) {
  const chats = [chat, ...stored("dash-chats", []).filter((one) => one.id !== chat.id)];
  chats.length = Math.min(chats.length, MAX_CHATS);
  while (!store("dash-chats", chats) && chats.length > 1) chats.pop(); // no room for the oldest
  listChats();
}
function listChats() {
  const chats = stored("dash-chats", []);
  const names = chats.map((one) => new Option(one.messages[0].content.slice(0, 60), one.id));
  const here = chats.some((one) => one.id === chat.id);
  $("chats").replaceChildren(...(here ? [] : [new Option("(new chat)", "")]), ...names);
  $("chats").value = here ? chat.id : "";
  $("delete").disabled = !here;
}
function openChat(found) {
  if (running) running.abort();
  chat = found || { id: Date.now(), messages: [] };
  columns = [];
  $("talk").replaceChildren();
  for (const { role, content, reasoning, facts } of chat.messages) {
    const element = add(role === "user" ? "user" : "model", role === "user" ? content : "");
    if (role === "user") continue;
    part(element, "text").innerHTML = markdown(content);
    if (reasoning) thoughts(element).textContent = reasoning;
    part(element, "facts").textContent = facts || "";
  }
  draw();
  listChats();
}

function chosen() { return models.find((one) => one.id === $("model").value); }
function range() { // of budgets: from the cheapest preset to all
  const presets = Object.values(chosen().dash.presets);
  return presets.length ? [Math.min(...presets), Math.max(...presets)] : null;
}
function budget() {
  const ends = range();
  return ends && Math.min(ends[1], ends[0] + (ends[1] - ends[0]) * Number($("budget").value));
}
function slides() { // whether the slider changes anything, by the server's own policy or the scorer
  const ends = range(), { budget: usual, scorer } = chosen().dash;
  return ends !== null && ends[0] < ends[1] && (usual !== null || scorer);
}
function tell() {
  const value = moved ? budget() : chosen().dash.budget;
  $("budget").disabled = !slides();
  $("told").textContent = value === null ? chosen().dash.policy : `${Math.round(value * 100)} % of the time at ${chosen().dash.actions[0]}`;
}
function start() { // at the server's own budget until the slider is moved
  const ends = range(), usual = chosen().dash.budget ?? chosen().dash.presets.balanced;
  moved = false;
  $("budget").value = ends ? (usual - ends[0]) / (ends[1] - ends[0] || 1) : 0;
  tell();
  $("key").replaceChildren(); // the colors of the actions that this model has
  for (const name of chosen().dash.actions) {
    const mark = document.createElement("i");
    mark.style.background = `var(--${name})`;
    $("key").append(mark, name);
  }
}
function shade(cost) { // cheap green, expensive red
  const share = Math.max(0, Math.min(1, (cost - 0.4) / 0.6));
  return `hsl(${130 - 130 * share} 60% 50% / 0.28)`;
}
function draw(from = 0) { // the columns from one on; a wider canvas is empty
  const canvas = $("path"), style = getComputedStyle(document.documentElement);
  const width = Math.max(60, 2 ** Math.ceil(Math.log2(columns.length || 1)));
  const height = columns.length ? columns[0].length : 1;
  if (!from || canvas.width !== width) { canvas.width = width; canvas.height = height; from = 0; }
  const context = canvas.getContext("2d");
  for (let token = from; token < columns.length; token++) {
    [...columns[token]].forEach((letter, layer) => {
      context.fillStyle = style.getPropertyValue(`--${NAMES[letter]}`);
      context.fillRect(token, layer, 1, 1);
    });
  }
}
function add(kind, text = "") {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  $("talk").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}
function part(element, kind) {
  const inner = document.createElement("div");
  inner.className = kind;
  element.append(inner);
  return inner;
}
function thoughts(element) { // folded, before the answer
  const folded = document.createElement("details"), title = document.createElement("summary");
  title.textContent = "Thoughts";
  folded.append(title);
  element.prepend(folded);
  return part(folded, "thoughts");
}

function request() {
  const system = $("system").value.trim();
  const said = chat.messages.map(({ role, content }) => ({ role, content }));
  const messages = system ? [{ role: "system", content: system }, ...said] : said;
  const body = { model: $("model").value, messages, stream: true };
  for (const name of SETTINGS.slice(1)) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if (moved) {
    body.budget = budget();
    if (chosen().dash.budget === null) body.policy = "dash"; // the server's own takes no budget
  }
  return body;
}
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split("\n\n");
    rest = found.pop();
    for (const event of found) if (event !== "data: [DONE]") yield JSON.parse(event.slice(6));
  }
}
async function answer() {
  const element = add("model"), text = part(element, "text"), tokens = part(element, "tokens");
  const began = performance.now(), here = chat;
  let said = "", thought = "", folded = null, first = 0, last = null, due = false;
  const show = () => { due = false; text.innerHTML = markdown(said); element.scrollIntoView({ block: "end" }); };
  tokens.hidden = true;
  columns = [];
  draw();
  const mine = running = new AbortController();
  $("send").textContent = "Stop";
  try {
    const response = await api("/v1/chat/completions",
      { method: "POST", body: JSON.stringify(request()), signal: mine.signal });
    for await (const data of events(response)) {
      if (data.error) throw new Error(data.error.message);
      const { content = "", reasoning_content: reasoning = "" } = data.choices[0].delta;
      if (reasoning) folded ??= thoughts(element);
      if (reasoning) folded.textContent = thought += reasoning;
      if (data.dash && data.dash.path) {
        first = first || performance.now();
        columns.push(data.dash.path);
        draw(columns.length - 1);
        const token = document.createElement("span");
        token.textContent = reasoning + content;
        token.style.background = shade(data.dash.cost);
        token.title = `${data.dash.ms} ms, cost ${Math.round(data.dash.cost * 100)} %`;
        tokens.append(token);
      } else if (data.dash) last = data.dash;
      said += content;
      if (!due) { due = true; requestAnimationFrame(show); } // at most once a frame
    }
  } catch (error) {
    if (error.name !== "AbortError") part(element, "error").textContent = error.message;
  }
  show();
  const seconds = (performance.now() - first) / 1000, facts = part(element, "facts");
  const shares = last ? Object.entries(last.actions).map(([a, s]) => `${a} ${Math.round(s * 100)} %`) : [];
  const speed = columns.length > 1 ? [`${((columns.length - 1) / seconds).toFixed(1)} tokens a second`] : [];
  const figures = [`${columns.length} tokens`, ...speed, `first after ${Math.round(first - began)} ms`, ...shares];
  if (columns.length) {
    facts.textContent = figures.join(" · ");
    const other = document.createElement("button");
    other.textContent = "tokens by cost";
    other.onclick = () => {
      tokens.hidden = !(text.hidden = tokens.hidden);
      other.textContent = text.hidden ? "text" : "tokens by cost";
    };
    facts.append(other);
  }
  facts.scrollIntoView({ block: "end" });
  if (here.deleted) said = "";
  else if (said) here.messages.push({ role: "assistant", content: said, reasoning: thought, facts: figures.join(" · ") });
  else {
    const { content } = here.messages.pop();
    $("text").value ||= content; // to be sent again
  }
  if (said) keepChat(here);
  if (running !== mine) return; // another chat's answer has begun
  running = null;
  $("send").textContent = "Send";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  chat.messages.push({ role: "user", content: text });
  add("user", text);
  answer();
});
$("text").addEventListener("keydown", (event) => {
  const composing = event.isComposing || event.keyCode === 229; // Enter then chooses a word
  if (event.key === "Enter" && !event.shiftKey && !composing) { event.preventDefault(); $("form").requestSubmit(); }
});
$("budget").addEventListener("input", () => { moved = true; tell(); });
$("model").addEventListener("change", () => { openChat(); start(); });
$("new").addEventListener("click", () => openChat());
$("chats").addEventListener("change", () =>
  openChat(stored("dash-chats", []).find((one) => String(one.id) === $("chats").value)));
$("again").addEventListener("click", () => {
  if (running || chat.messages.at(-1)?.role !== "assistant") return;
  chat.messages.pop();
  [...document.querySelectorAll("#talk > .model")].at(-1).remove();
  answer();
});
$("delete").addEventListener("click", () => {
  store("dash-chats", stored("dash-chats", []).filter((one) => one.id !== chat.id));
  chat.deleted = true; // its answer may still be coming
  openChat();
});
for (const name of SETTINGS) {
  $(name).value = stored("dash-settings", {})[name] ?? "";
  $(name).addEventListener("change", () =>
    store("dash-settings", Object.fromEntries(SETTINGS.map((each) => [each, $(each).value]))));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
(async () => {
  try {
    models = (await (await api("/v1/models")).json()).data;
    for (const one of models) $("model").append(new Option(one.id, one.id));
    start();
    listChats();
    $("text").focus();
  } catch (error) { part(add("model"), "error").textContent = error.message; }
})();
