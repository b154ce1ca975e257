"""Command line and reports: the only package that knows both the model and the backends."""
