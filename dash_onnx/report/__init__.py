"""What the policy of a bundle does: `dash-report` as an HTML page, `dash-run --show-path` as text.

`report` gathers the data, `page` renders it with the templates next to it. Only `sample` needs the
runtime, and uses just its public API; the rest takes data.
The charts are SVG in a template: a plotting library would be larger than the runtime, and its
pictures would neither follow the reader's light or dark theme nor show figures under the pointer.
"""
