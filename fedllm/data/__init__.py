"""Where text comes from and how it reaches a model: assets, sources, prompts, batches, and who holds what."""
