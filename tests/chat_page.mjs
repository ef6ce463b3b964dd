// Chats on the page of dash-serve in headless Chromium; prints what it shows, as JSON.
//
//   node tests/chat_page.mjs URL QUESTION [--picture FILE] [--width N] [--dark]

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
const budgets = []; // that the page asks for
page.on("request", (request) => {
  if (request.method() === "POST") budgets.push(request.postDataJSON().budget ?? null);
});
await page.goto(url);
await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
const told = await page.textContent("#told");
for (const [index, question] of questions.entries()) {
  if (index) await page.fill("#budget", "0"); // the slider
  await page.fill("#text", question);
  await page.keyboard.press("Enter");
  await page.waitForFunction((n) => document.querySelectorAll(".facts, .error").length > n, index);
}
problems.push(...(await page.$$eval(".error", (errors) => errors.map((one) => one.textContent))));
if (values.picture) await page.screenshot({ path: values.picture });
const found = await page.evaluate(() => ({
  wide: document.documentElement.scrollWidth > innerWidth,
  text: document.body.innerText,
  facts: Array.from(document.querySelectorAll(".facts"), (fact) => fact.textContent),
}));
console.log(JSON.stringify({ problems, budgets, told, ...found }));
await browser.close();
