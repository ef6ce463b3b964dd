// Asks the page of examples/web in headless Chromium; prints what it shows, as JSON.
//
//   node tests/browser.mjs URL QUESTION [--budget X] [--picture FILE] [--width N] [--dark]

import { createRequire } from "node:module";
import { parseArgs } from "node:util";

const { chromium } = createRequire(new URL("../examples/web/", import.meta.url))("playwright-core");
const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    budget: { type: "string" },
    picture: { type: "string" },
    width: { type: "string", default: "1080" },
    height: { type: "string", default: "720" },
    dark: { type: "boolean", default: false },
    timeout: { type: "string", default: "60" }, // seconds
    chromium: { type: "string", default: "/usr/bin/chromium" },
  },
});
const [url, ...questions] = positionals;
const browser = await chromium.launch({ executablePath: values.chromium, args: ["--no-sandbox"] });
const page = await browser.newPage({
  viewport: { width: Number(values.width), height: Number(values.height) },
  colorScheme: values.dark ? "dark" : "light",
});
page.setDefaultTimeout(Number(values.timeout) * 1e3);
const problems = [];
page.on("pageerror", (error) => problems.push(String(error)));
page.on("requestfailed", (request) => problems.push(request.url()));
await page.goto(url);
await page.waitForSelector("body[data-state=ready]");
if (values.budget) {
  await page.$eval("#budget", (slider, value) => {
    slider.value = value;
    slider.oninput();
  }, values.budget);
}
for (const [index, question] of questions.entries()) {
  await page.fill("#question", question);
  await page.press("#question", "Enter");
  await page.waitForFunction((wanted) => {
    const answers = document.querySelectorAll(".turn.model").length;
    return answers === wanted && document.body.dataset.state === "ready";
  }, index + 1);
}
if (values.picture) await page.screenshot({ path: values.picture });
const found = await page.evaluate(() => ({
  isolated: crossOriginIsolated,
  budget: document.getElementById("percent").textContent,
  note: document.querySelector(".note")?.textContent,
  wide: document.documentElement.scrollWidth > innerWidth,
  answers: Array.from(document.querySelectorAll(".turn.model"), (turn) => ({
    text: Array.from(turn.querySelectorAll(".token"), (token) => token.dataset.text),
    strips: Array.from(turn.querySelectorAll(".strip"), (strip) => strip.style.background),
    titles: Array.from(turn.querySelectorAll(".token"), (token) => token.title),
  })),
}));
console.log(JSON.stringify({ problems, ...found }));
await browser.close();
