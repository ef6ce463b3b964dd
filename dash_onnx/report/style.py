"""The style sheet of the report: light and dark, readable on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2530; --soft: #5d6876; --line: #e2e1da;
  --dash: #b3266d; --static: #5b6b7d; --uniform: #a86400;
  --full: #16325c; --int8: #2f7ebc; --int4: #93cbe6; --skip: #f2a33a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1c2229; --ink: #e6e9ec; --soft: #9aa6b2; --line: #313a44;
    --dash: #f26aa8; --static: #97a8ba; --uniform: #e8ad4c;
    --full: #eef4fa; --int8: #6fb1e6; --int4: #2d668f; --skip: #e58f1c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 960px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 28px 0 2px; }
p { margin: 4px 0 12px; max-width: 68ch; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px 20px; margin-top: 20px;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; }
.tiles { margin-top: 18px; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; margin: 6px 0; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .tick { fill: var(--soft); font-size: 11.5px; }
svg .name { fill: var(--soft); font-size: 12.5px; }
svg .note { font-size: 12.5px; }
svg .strong { font-weight: 600; }
svg .token { font: 10px ui-monospace, Menlo, Consolas, monospace; }
.wide svg { min-width: 780px !important; }
.small svg { min-width: 0 !important; }
.square svg { min-width: 320px !important; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 8px; }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.mark { stroke: var(--soft); stroke-dasharray: 3 4; }
.line { fill: none !important; stroke-width: 2; }
.s-dash { fill: var(--dash); stroke: var(--dash); }
.s-static { fill: var(--static); stroke: var(--static); }
.s-uniform { fill: var(--uniform); stroke: var(--uniform); }
circle.s-dash, circle.s-static, path.s-uniform { stroke: var(--card); stroke-width: 1; }
circle.hollow { fill: var(--card); stroke: var(--dash); stroke-width: 2; }
.preset { fill: none; stroke: var(--ink); stroke-width: 2; pointer-events: all; }
.whisker { stroke: var(--dash); opacity: 0.6; }
.cloud { fill: var(--soft); opacity: 0.35; }
.over { fill: transparent; }
.over:hover { fill: var(--ink); fill-opacity: 0.14; }
.a-full { fill: var(--full); background: var(--full); }
.a-int8 { fill: var(--int8); background: var(--int8); }
.a-int4 { fill: var(--int4); background: var(--int4); }
.a-skip { fill: var(--skip); background: var(--skip); }
.k-dash { background: var(--dash); border-radius: 50%; }
.k-static { background: var(--static); border-radius: 50%; }
.k-uniform { background: var(--uniform); transform: rotate(45deg) scale(0.8); }
.k-preset { border: 2px solid var(--ink); border-radius: 50%; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.9rem; margin: 4px 0; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; }
table { border-collapse: collapse; font-size: 0.88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.path { text-align: left; font: 11px ui-monospace, Menlo, Consolas, monospace;
  letter-spacing: 0.06em; }
td .bar { display: inline-block; height: 9px; border-radius: 2px; margin-right: 8px; }
tr.preset-row td { font-weight: 600; }
summary { cursor: pointer; color: var(--soft); margin-top: 12px; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label {
  display: inline-block; padding: 5px 14px; margin: 8px 4px 4px 0; cursor: pointer;
  border: 1px solid var(--line); border-radius: 999px; font-size: 0.95rem;
}
.tabs > input:checked + label { background: var(--ink); color: var(--card); }
.tabs > input:focus-visible + label { outline: 2px solid var(--dash); outline-offset: 2px; }
.tab { display: none; }
@media print { .tab { display: block; } .tabs > label { display: none; } }
blockquote { margin: 8px 0 14px; padding: 8px 14px; border-left: 3px solid var(--line);
  white-space: pre-wrap; color: var(--soft); font-size: 0.9rem; max-height: 9em;
  overflow-y: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 0.9rem;
  margin: 8px 0 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 16px 8px 40px; }
  section { padding: 14px 12px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
"""
