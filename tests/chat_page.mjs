// Chats on the page of dash-serve in headless Chromium; prints what it shows, as JSON.
//
//   node tests/chat_page.mjs URL QUESTION... [--picture FILE] [--width N] [--dark]
//     [--system TEXT] [--tokens N] [--markdown TEXT]

import { createRequire } from "node:module";
import { parseArgs } from "node:util";

const { chromium } = createRequire(new URL("../examples/web/", import.meta.url))("playwright-core");
const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    picture: { type: "string" },
    width: { type: "string", default: "1200" },
    height: { type: "string", default: "800" },
    dark: { type: "boolean", default: false },
    system: { type: "string" },
    tokens: { type: "string" }, // of an answer at most
    markdown: { type: "string", default: "" }, // to be rendered
    chromium: { type: "string", default: "/usr/bin/chromium" },
  },
});
const [url, ...questions] = positionals;
const browser = await chromium.launch({ executablePath: values.chromium, args: ["--no-sandbox"] });
const page = await browser.newPage({
  viewport: { width: Number(values.width), height: Number(values.height) },
  colorScheme: values.dark ? "dark" : "light",
});
page.setDefaultTimeout(120e3); // a machine of CI may be slow
const problems = [];
page.on("pageerror", (error) => problems.push(String(error)));
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
page.on("requestfailed", (request) => problems.push(request.url()));
page.on("request", (request) => request.url().startsWith(url) || problems.push(request.url()));
const asked = []; // by the page
page.on("request", (request) => request.method() === "POST" && asked.push(request.postDataJSON()));
await page.goto(url);
await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
const told = await page.textContent("#told");
const slides = await page.isEnabled("#budget"); // the slider
if (values.system || values.tokens) {
  await page.click("#settings summary");
  await page.fill("#system", values.system ?? "");
  await page.fill("#max_tokens", values.tokens ?? "");
  await page.fill("#temperature", "0");
  await page.click("#settings summary");
}
await page.fill("#text", "word");
await page.dispatchEvent("#text", "keydown", { key: "Enter", isComposing: true }); // chooses a word
const typed = await page.inputValue("#text");
for (const [index, question] of questions.entries()) {
  if (index && slides) await page.fill("#budget", "0");
  await page.fill("#text", question);
  await page.keyboard.press("Enter");
  await page.waitForFunction((n) => document.querySelectorAll(".facts").length > n, index);
}
problems.push(...(await page.$$eval(".error", (errors) => errors.map((one) => one.textContent))));
if (values.picture) await page.screenshot({ path: values.picture });
const found = await page.evaluate((text) => ({
  markdown: markdown(text),
  wide: document.documentElement.scrollWidth > innerWidth,
  text: document.body.innerText,
  facts: Array.from(document.querySelectorAll(".facts"), (fact) => fact.textContent),
}), values.markdown);
const shown = () => page.$$eval("#talk > div", (parts) => parts.map((one) => one.firstChild?.textContent));
const before = await shown();
await page.click(".facts button");
const colored = await page.$$eval(".tokens:not([hidden]) span", (tokens) => tokens.length);
await page.reload(); // the browser has kept the chat
await page.waitForFunction(() => document.querySelector("#chats").options.length > 1);
const chats = await page.$$eval("#chats option", (options) => options.map((one) => one.value));
await page.selectOption("#chats", chats.at(-1));
const after = await shown();
const kept = { before, after, system: await page.inputValue("#system") };
await page.click("#again"); // the last message is answered again
await page.waitForSelector(".facts button");
const again = { roles: asked.at(-1).messages.map((one) => one.role), shown: (await shown()).length };
await page.click("#delete");
const left = await page.$$eval("#chats option", (options) => options.map((one) => one.textContent));
const result = { problems: [...problems], asked: asked.slice(0, questions.length), told, slides, colored, kept, again, left, ...found };
await page.fill("#text", questions[0]); // a chat that is deleted while it is answered
await page.keyboard.press("Enter");
await page.waitForFunction(() => !document.querySelector("#delete").disabled);
await page.evaluate(() => new MutationObserver((_, watch) => {
  const spans = Array.from(document.querySelectorAll("#talk > :last-child .tokens span"));
  if (!spans.some((one) => one.textContent)) return;
  watch.disconnect();
  document.querySelector("#delete").click();
}).observe(document.querySelector("#talk"), { childList: true, subtree: true }));
await page.fill("#text", questions[0]);
await page.keyboard.press("Enter");
await page.waitForTimeout(1000);
const stored = await page.evaluate(() => localStorage["dash-chats"]);
console.log(JSON.stringify({ ...result, typed, stored }));
await browser.close();
