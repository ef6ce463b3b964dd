"""What exporters, runtime and tools share: the bundle, its manifest, policies and text."""
