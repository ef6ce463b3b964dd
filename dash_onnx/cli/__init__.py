"""The command line tools: dash-export, dash-run, dash-eval."""
