"""What the policy of a bundle does: `dash-report` as an HTML page, `dash-run --show-path` as text.

`report` gathers the data, `page` renders it with the templates beside it. Whatever needs the
runtime is in `sample`, which uses its public API alone; the rest takes data.
The charts are SVG in a template: a plotting library would weigh more than the runtime, and its
pictures would neither follow the reader's light or dark theme nor tell figures under the pointer.
"""
