// The fused graph in Node, which knows nothing of layer skipping: it only passes the budget on.
//
//   dash-fuse out/ out/fused --for node && npm install --prefix examples/node
//   node examples/node/generate.mjs out/fused "What is the capital of France?" --budget fast

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";
import { Fused, Text } from "../web/fused.mjs";

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    budget: { type: "string" }, // fraction of the reference's time per token, or a preset
    "max-tokens": { type: "string", default: "256" },
    json: { type: "boolean", default: false }, // ids and paths instead of text
  },
});
const [folder, question = "Hello!"] = positionals;
const read = (name) => readFile(join(folder, name), "utf8");

const text = await Text.open({ Tokenizer, Template }, read);
const facts = JSON.parse(await read("dash_fused.json"));
const fail = (reason) => {
  console.error(reason);
  process.exit(2);
};
if (values.budget && !facts.budgets) fail("this graph has one path, so it takes no --budget");
const budget = facts.budgets?.presets[values.budget] ?? values.budget;
if (budget && !(Number(budget) > 0)) {
  const presets = Object.keys(facts.budgets.presets).join(", ");
  fail(`--budget ${budget} is neither a fraction nor a preset (${presets})`);
}
if (!(Number(values["max-tokens"]) > 0)) {
  fail(`--max-tokens ${values["max-tokens"]} is not a number of tokens`);
}
const session = await ort.InferenceSession.create(join(folder, "model.onnx"));
const model = new Fused(ort, session, facts);
const options = {
  eos: text.eos,
  limit: Number(values["max-tokens"]),
  budget: () => budget && Number(budget),
};
const prompt = text.encode([{ role: "user", content: question }]);
const add = text.decoder();
const tokens = [];
const paths = [];
for await (const { token, path } of model.generate(prompt, options)) {
  tokens.push(token);
  paths.push(path);
  if (!values.json) process.stdout.write(add(token));
}
console.log(values.json ? JSON.stringify({ prompt, tokens, paths }) : "");
