// A fused folder (`dash-fuse BUNDLE FOLDER --for web`, or node) in onnxruntime-web, or -node.

export class Fused {
  /**
   * @param ort the module `onnxruntime-web` or `onnxruntime-node`
   * @param session of `model.onnx`
   * @param facts content of `dash_fused.json`
   */
  constructor(ort, session, facts) {
    Object.assign(this, { ort, session, facts });
    this.reset();
  }

  /** Forgets everything. */
  reset() {
    this.tokens = []; // what the cache holds
    this.past = {};
    for (const input of this.session.inputMetadata.filter(({ name }) => name.startsWith("past"))) {
      const [, heads, , size] = input.shape;
      const empty = new Float32Array(0);
      this.past[input.name] = new this.ort.Tensor("float32", empty, [1, heads, 0, size]);
    }
  }

  /**
   * Runs tokens after those that the cache holds.
   *
   * @param ids one token is decoded as the scorer decides, several run at one precision
   * @param budget fraction of the reference's time per token; undefined takes the default
   * @returns the most likely next token, and the action of each layer
   */
  async run(ids, budget) {
    const { Tensor } = this.ort;
    const total = this.tokens.length + ids.length;
    const feeds = {
      ...this.past,
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    };
    const { budgets, actions, path } = this.facts;
    if (budgets) {
      feeds.dash_budget = new Tensor("float32", [budget ?? budgets.default], [1]);
    }
    const found = await this.session.run(feeds);
    for (const name in this.past) {
      this.past[name] = found[name.replace("past_key_values", "present")];
    }
    this.tokens.push(...ids);
    const { data, dims } = found.logits;
    const decided = found.dash_path && Array.from(found.dash_path.data, (i) => actions[Number(i)]);
    return { token: argmax(data.subarray(data.length - dims[2])), path: decided ?? path };
  }

  /**
   * Greedy generation; the cache is used again where `ids` goes on from what it holds.
   *
   * @param ids the whole prompt
   * @param options `eos`: ids that end the text; `limit`: most tokens; `budget()`: asked per token
   */
  async *generate(ids, { eos, limit, budget = () => undefined }) {
    if (ids.length <= this.tokens.length || this.tokens.some((id, at) => id !== ids[at])) {
      this.reset();
    }
    const { context } = this.facts;
    if (ids.length > context) throw new Error(`${ids.length} tokens exceed the context, ${context}`);
    let next = ids.slice(this.tokens.length);
    for (let count = 0; count < Math.min(limit, context - ids.length + 1); count += 1) {
      const started = performance.now();
      const { token, path } = await this.run(next, budget());
      if (eos.includes(token)) return;
      yield { token, path, ms: performance.now() - started };
      next = [token];
    }
  }
}

/** Tokenizer, chat template and ending tokens of a fused folder. */
export class Text {
  /**
   * @param modules `Tokenizer` of @huggingface/tokenizers, `Template` of @huggingface/jinja
   * @param read async: the text of a file in the folder
   */
  static async open({ Tokenizer, Template }, read) {
    const text = new Text();
    const json = async (name) => JSON.parse(await read(name));
    const config = await json("tokenizer_config.json");
    text.tokenizer = new Tokenizer(await json("tokenizer.json"), config);
    const none = (error) => {
      if (error.code !== "ENOENT" && !`${error.message}`.includes("404")) throw error;
      return null; // a model without chats
    };
    const source = await read("chat_template.jinja").catch(none);
    text.template = source && new Template(source);
    text.takesParts = source && takesParts(text.template);
    const special = (token) => token?.content ?? token;
    text.special = { bos_token: special(config.bos_token), eos_token: special(config.eos_token) };
    text.eos = [(await json("generation_config.json")).eos_token_id].flat();
    return text;
  }

  /** Token ids of a conversation that waits for an answer; of its last text, without a template. */
  encode(messages) {
    if (!this.template) return this.tokenizer.encode(messages.at(-1).content).ids;
    const unset = { tools: null, documents: null };
    if (this.takesParts) messages = messages.map(inParts);
    const values = { ...unset, ...this.special, messages, add_generation_prompt: true };
    return this.tokenizer.encode(this.template.render(values), { add_special_tokens: false }).ids;
  }

  /** What each new token adds to the text; nothing while a character is incomplete. */
  decoder() {
    const tokens = [];
    let shown = "";
    return (token) => {
      tokens.push(token);
      const now = this.tokenizer.decode(tokens, {
        skip_special_tokens: true,
        clean_up_tokenization_spaces: false, // it would change text that was shown already
      });
      if (now.endsWith("\uFFFD")) return "";
      const added = now.slice(shown.length);
      shown = now;
      return added;
    };
  }
}

/** Whether a template shows text only in a list of parts, as beside images. */
function takesParts(template) {
  const asked = { role: "user", content: "What is the capital of France?" };
  const shows = (message) => {
    try {
      return template.render({ messages: [message], tools: null }).includes(asked.content);
    } catch {
      return false;
    }
  };
  return !shows(asked) && shows(inParts(asked));
}

function inParts(message) {
  return { ...message, content: [{ type: "text", text: message.content }] };
}

function argmax(values) {
  let best = 0;
  for (let at = 1; at < values.length; at += 1) {
    if (values[at] > values[best]) best = at;
  }
  return best;
}
