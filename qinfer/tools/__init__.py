"""Tools that make and change model files: each is `python -m qinfer.tools.NAME`."""
