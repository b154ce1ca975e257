"""Command line and reports: the only package that knows both the model and the backends."""

import os

# torch would load every vendor extension it finds while it is imported, and a broken one would stop it; the backend of that vendor loads its own
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
