"""The server: OpenAI's API over the runtime, and a chat page.

`schema` is what requests may say and answers look like, `service` runs them on loaded bundles,
`app` puts both behind HTTP, `errors` says what is refused. The runtime imports nothing of this.
"""
