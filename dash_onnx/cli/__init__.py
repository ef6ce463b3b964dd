"""The command line tools: one module each; `common` is shared."""
