"""Examples. Start with `examples.demo.train`."""
