"""The demo: a Gradio page over the package's models, run by `umt-hf demo` or as a Space on the Hub."""
