"""Names of the backends. Each is imported only when a binding asks for it."""

NAMES = ("cpu", "cpu_invariant", "cpu_native")
