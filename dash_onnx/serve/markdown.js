"use strict";
// Markdown of an answer as HTML. The text is escaped first: no tag of it survives, links lead to
// http alone, and images become links, so that nothing is loaded.
const LIST = /^( *)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const DEEPEST = 8; // quotes and lists inside each other

function markdown(text) {
  const escaped = text.replace(/\0/g, "").replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  return blocks(escaped.split(/\r?\n/), 0);
}

function inline(text) {
  const kept = []; // what must not be looked at again
  const keep = (html) => `\0${kept.push(html) - 1}\0`;
  text = text
    .replace(/(`+)(.+?)\1(?!`)/g, (_, ticks, code) => keep(`<code>${code.trim()}</code>`))
    .replace(/!?\[([^\[\]]*)\]\((https?:\/\/[^\s()]+)\)/g, (_, label, url) =>
      `${keep(`<a href="${url}" target="_blank" rel="noopener noreferrer">`)}${label || url}${keep("</a>")}`)
    .replace(/\*\*(?=\S)(.+?)\*\*/g, "<strong>$1</strong>")
    .replace(/\*(?=\S)([^*]+?)\*/g, "<em>$1</em>")
    .replace(/(^|\W)__(?=\S)(.+?)__(?!\w)/g, "$1<strong>$2</strong>")
    .replace(/(^|\W)_(?=\S)([^_]+?)_(?!\w)/g, "$1<em>$2</em>")
    .replace(/~~(?=\S)(.+?)~~/g, "<del>$1</del>");
  return text.replace(/\0(\d+)\0/g, (_, index) => kept[index]);
}

function ruled(line) { // below the head of a table
  return line.includes("-") && line.includes("|") && /^[\s|:-]+$/.test(line);
}

function blocks(lines, depth) {
  const html = [];
  const starts = (line) => /^ {0,3}(```|~~~|#{1,6}\s|&#62;)/.test(line) || RULE.test(line) || LIST.test(line);
  const take = (wanted) => { // the lines from here that are wanted
    const start = at;
    while (at < lines.length && wanted(lines[at])) at++;
    return lines.slice(start, at);
  };
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = line.match(/^ {0,3}(```+|~~~+)/))) {
      at++;
      const code = take((one) => !one.trim().startsWith(match[1]));
      at++;
      html.push(`<pre><code>${code.join("\n")}</code></pre>`);
    } else if ((match = line.match(/^ {0,3}(#{1,6})\s+(.*?)[\s#]*$/))) {
      at++;
      html.push(`<h${match[1].length}>${inline(match[2])}</h${match[1].length}>`);
    } else if (RULE.test(line)) {
      at++;
      html.push("<hr>");
    } else if (depth < DEEPEST && /^ {0,3}&#62;/.test(line)) {
      const quoted = take((one) => /^ {0,3}&#62;/.test(one));
      html.push(`<blockquote>${blocks(quoted.map((one) => one.replace(/^ {0,3}&#62; ?/, "")), depth + 1)}</blockquote>`);
    } else if (depth < DEEPEST && (match = line.match(LIST))) {
      const indent = match[1].length, numbered = match[2] !== undefined, items = [];
      while (at < lines.length && (match = lines[at].match(LIST)) && match[1].length <= indent + 1
          && (match[2] !== undefined) === numbered) {
        at++;
        const rest = take((one) => /^ {2,}\S/.test(one.slice(indent)) || (!one.trim() && /^ {2,}\S/.test((lines[at + 1] || "").slice(indent))));
        items.push(`<li>${blocks([match[3], ...rest.map((one) => one.slice(indent).replace(/^ {2,4}/, ""))], depth + 1).replace(/^<p>(.*?)<\/p>/s, "$1")}</li>`);
        while (at + 1 < lines.length && !lines[at].trim() && LIST.test(lines[at + 1])) at++;
      }
      html.push(numbered ? `<ol>${items.join("")}</ol>` : `<ul>${items.join("")}</ul>`);
    } else if (line.includes("|") && ruled(lines[at + 1] || "")) {
      const [head, , ...body] = take((one) => one.includes("|"));
      const row = (one, tag) => `<tr>${one.trim().replace(/^\||\|$/g, "").split("|").map((cell) => `<${tag}>${inline(cell.trim())}</${tag}>`).join("")}</tr>`;
      html.push(`<table>${row(head, "th")}${body.map((one) => row(one, "td")).join("")}</table>`);
    } else {
      at++;
      const more = take((one) => one.trim() && !starts(one));
      html.push(`<p>${[line, ...more].map((one) => inline(one.trim())).join("<br>")}</p>`);
    }
  }
  return html.join("");
}
