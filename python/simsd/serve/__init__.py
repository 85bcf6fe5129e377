"""An OpenAI-compatible server in front of one engine: `simsd serve`, or `build_app` in a server of one's own."""
