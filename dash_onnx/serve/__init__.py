"""The server: OpenAI's API over the runtime, and a chat page.

`schema` defines requests and answers, `service` runs them on loaded bundles, `app` exposes both
over HTTP, `errors` defines refusals. The runtime imports nothing from here.
"""
